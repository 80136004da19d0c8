"""The bank keeps whole entries by what they depend on, in so much memory and no more."""
import pytest
import torch

from pack.core.reference.bank import Bank
from pack.core.reference.entry import Entry, Key, fingerprint


def entry(name: str, tokens: int = 4) -> Entry:
    generator = torch.Generator().manual_seed(len(name))
    pair = tuple(torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(2))
    return Entry("flux", {"double.0": pair}, Key({"content": name}), name)


def test_an_entry_is_found_by_an_equal_key_and_by_no_other():
    bank = Bank()
    bank.put(entry("a"))
    assert bank.get(Key({"content": "a"})).source == "a"
    assert bank.get(Key({"content": "b"})) is None and bank.get(Key({"content": "a", "slot": "1"})) is None


def test_the_order_of_a_keys_fields_does_not_matter_and_every_field_does():
    one, other = Key({"a": "1", "b": "2"}), Key({"b": "2", "a": "1"})
    assert one.digest == other.digest
    assert one.differing(Key({"a": "1", "b": "3", "c": "4"})) == ["b", "c"]


def test_the_least_recently_used_leaves_when_there_is_no_room():
    size = entry("a").bytes
    bank = Bank(limit=2 * size)
    bank.put(entry("a"))
    bank.put(entry("b"))
    bank.get(Key({"content": "a"}))
    bank.put(entry("c"))
    assert bank.get(Key({"content": "b"})) is None and bank.get(Key({"content": "a"})) and bank.get(Key({"content": "c"}))
    assert bank.bytes <= bank.limit


def test_an_entry_larger_than_the_limit_is_refused_and_throws_nothing_out():
    bank = Bank(limit=entry("a").bytes)
    bank.put(entry("a"))
    assert not bank.put(entry("b", tokens=40))
    assert bank.get(Key({"content": "a"})) is not None


def test_a_smaller_limit_acts_at_once():
    bank = Bank()
    for name in "abc":
        bank.put(entry(name))
    bank.limited(entry("a").bytes)
    assert len(bank) == 1 and bank.get(Key({"content": "c"})) is not None


def test_what_is_kept_shares_no_memory_with_what_was_given():
    bank, given = Bank(), entry("a")
    bank.put(given)
    before = [tensor.clone() for tensor in given.blocks["double.0"]]
    for tensor in given.blocks["double.0"]:
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(bank.get(given.key).blocks["double.0"], before, strict=True))


def test_every_tensor_that_was_page_locked_is_let_go_again():
    locked = []
    bank = Bank(limit=entry("a").bytes, pin=lambda tensor: locked.append(tensor.data_ptr()) or True, unpin=lambda tensor: locked.remove(tensor.data_ptr()))
    bank.put(entry("a"))
    assert len(locked) == 2
    bank.put(entry("b"))
    assert len(locked) == 2
    assert bank.clear() > 0 and not locked


def test_a_models_token_is_its_own_even_after_another_one_died():
    class Model:
        pass

    bank, tokens = Bank(), set()
    for _ in range(50):
        model = Model()
        tokens.add(bank.token(model))
        assert bank.token(model) in tokens
        del model
    assert len(tokens) == 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_fingerprint_tells_values_types_and_shapes_apart_and_not_where_they_lie(dtype):
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert fingerprint(values) == fingerprint(values.clone().t().contiguous().t())
    assert len({fingerprint(values), fingerprint(values.view(6, 4)), fingerprint(values.float() + 1), fingerprint(None)}) == 4
