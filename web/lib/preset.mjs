/** Settings that the chosen preset does not read are greyed out; only "custom" reads them. */
const READ_BY_ALL = new Set(["enabled", "preset", "few_steps", "budget_mib", "storage", "device"]);

export function followPreset(node) {
    const preset = node.widgets?.find((widget) => widget.name === "preset");
    if (!preset) return;
    const apply = () => {
        for (const widget of node.widgets) {
            if (!READ_BY_ALL.has(widget.name)) widget.disabled = preset.value !== "custom";
        }
        node.setDirtyCanvas?.(true, true);
    };
    // a workflow sets its values after the node was made, and a choice adds the widgets of what was chosen
    for (const [owner, name] of [[preset, "callback"], [node, "onConfigure"], [node, "onWidgetChanged"]]) {
        const before = owner[name];
        owner[name] = function (...args) {
            const result = before?.apply(this, args);
            queueMicrotask(apply);
            return result;
        };
    }
    queueMicrotask(apply);
}
