import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { followPreset } from "./lib/preset.mjs";

const STEP_CACHE = "Reprise_StepCache";

app.registerExtension({
    name: "reprise.step_cache",
    init() {
        // The server sends each run's record for whoever wants it; the front end throws at events that nobody listens to.
        api.addEventListener("reprise.report", () => {});
    },
    nodeCreated(node) {
        if (node.comfyClass === STEP_CACHE) followPreset(node);
    },
});
