"""What a policy server counts, in Prometheus' text format."""

from collections import Counter, deque

import numpy as np

QUANTILES = (0.5, 0.9, 0.99)


class ServerMetrics:
    """Counters since the start, and latency quantiles over the last 4096 answers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.clients = 0
        self._latency: deque[float] = deque(maxlen=4096)

    def answered(self, seconds: float, batch: int) -> None:
        """Note an answer: time from the message's arrival to its reply [s], and the size of its batch."""
        self.counts["answers"] += 1
        self.counts["batched"] += batch
        self._latency.append(seconds)

    def failed(self, kind: str) -> None:
        """Note a message that got an error for an answer."""
        self.errors[kind] += 1

    def quantiles(self) -> dict[float, float]:
        """Latency quantiles [s]; empty before the first answer."""
        if not self._latency:
            return {}
        return dict(zip(QUANTILES, np.quantile(np.array(self._latency), QUANTILES).tolist(), strict=True))

    def text(self) -> str:
        """The page that `/metrics` serves."""
        mean = self.counts["batched"] / max(self.counts["answers"], 1)
        lines = [
            "# TYPE headrace_clients gauge",
            f"headrace_clients {self.clients}",
            "# TYPE headrace_answers_total counter",
            f"headrace_answers_total {self.counts['answers']}",
            "# HELP headrace_batch_mean Observations per call of the policy, averaged over answers.",
            "# TYPE headrace_batch_mean gauge",
            f"headrace_batch_mean {mean:.3f}",
            "# TYPE headrace_errors_total counter",
            *(f'headrace_errors_total{{kind="{kind}"}} {count}' for kind, count in sorted(self.errors.items())),
            "# TYPE headrace_latency_seconds summary",
            *(f'headrace_latency_seconds{{quantile="{q}"}} {value:.6f}' for q, value in self.quantiles().items()),
            f"headrace_latency_seconds_count {self.counts['answers']}",
        ]
        return "\n".join(lines) + "\n"
