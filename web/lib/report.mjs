/** The last report of every node, by node id: what a run computed and skipped. For extensions and for the console. */
const reports = new Map();

export function remember(report) {
    if (report?.node_id != null) reports.set(String(report.node_id), report);
}

export function lastReport(nodeId) {
    return reports.get(String(nodeId));
}
