"""How a run's report reaches the user: a line of text under the node, and an event for whoever listens."""
import sys

from ..core.report import Report

EVENT = "reprise.report"


def notifier(node_id: str | None):
    """A callable that shows a report on the node `node_id`. Silent where no server runs."""
    def notify(report: Report) -> None:
        report.node_id = node_id
        server = running_server()
        if server is not None:
            show(report.line(), node_id)
            server.send_sync(EVENT, report.as_dict(), server.client_id)
    return notify


def text_notifier(node_id: str | None):
    """A callable that shows the line of a record on the node `node_id`."""
    return lambda record: show(record.line(), node_id)


def show(text: str, node_id: str | None) -> None:
    """Text under the node, where a server runs and the node is one of a graph."""
    server = running_server()
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def running_server():
    """The host's, where there is one; its module is not imported for this."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
