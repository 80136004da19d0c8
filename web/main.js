import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { followPreset } from "./lib/preset.mjs";
import { remember } from "./lib/report.mjs";

const STEP_CACHE = "Reprise_StepCache";

app.registerExtension({
    name: "reprise.step_cache",
    init() {
        // the front end throws at events that nobody has registered
        api.addEventListener("reprise.report", (event) => remember(event.detail));
    },
    nodeCreated(node) {
        if (node.comfyClass === STEP_CACHE) followPreset(node);
    },
});
