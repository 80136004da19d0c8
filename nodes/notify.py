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
            if node_id is not None:
                server.send_progress_text(report.line(), node_id, server.client_id)
            server.send_sync(EVENT, report.as_dict(), server.client_id)
    return notify


def running_server():
    """The host's, where there is one; its module is not imported for this."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
