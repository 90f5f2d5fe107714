"""Published success rates on the four Bridge tasks, to stand beside our own; every row is somebody else's number."""

from typing import NamedTuple

ORDER = ("simpler/spoon-on-towel", "simpler/carrot-on-plate", "simpler/stack-cube", "simpler/eggplant-in-basket")


class Peer(NamedTuple):
    """A published row.

    Attributes:
        policy: Name of the policy.
        regime: "zero-shot" when trained on real data only; "in-domain" when fine-tuned on about 100 successful
            simulated rollouts of these scenes. The two are different benchmarks.
        rates: Success [%] in the order of `ORDER`; None where not published.
        mean: Published mean [%].
        source: Where the figures are printed.
        success: Reading of success, where it is not the official last step.
    """

    policy: str
    regime: str
    rates: tuple[float | None, float | None, float | None, float | None]
    mean: float
    source: str
    success: str = "last step"


_NONE = (None, None, None, None)
_BREAKS = "stops at first success"
PEERS = (
    Peer("RT-1-X", "zero-shot", (0.0, 4.2, 0.0, 0.0), 1.1, "SIMPLER, arXiv 2405.05941"),
    Peer("Octo-Base", "zero-shot", (12.5, 8.3, 0.0, 43.1), 16.0, "SIMPLER, arXiv 2405.05941"),
    Peer("Octo-Small", "zero-shot", (47.2, 9.7, 4.2, 56.9), 29.5, "SIMPLER, arXiv 2405.05941"),
    Peer("OpenVLA", "zero-shot", (0.0, 0.0, 0.0, 4.1), 1.0, "SpatialVLA, arXiv 2501.15830"),
    Peer("SpatialVLA", "zero-shot", (20.8, 20.8, 25.0, 70.8), 34.4, "SpatialVLA, arXiv 2501.15830"),
    Peer("CogACT", "zero-shot", (71.7, 50.8, 15.0, 67.5), 51.3, "CogACT, arXiv 2411.19650"),
    Peer("open-pi-zero (beta)", "zero-shot", (84.6, 55.8, 47.9, 85.4), 68.4, "open-pi-zero README"),
    Peer("scratch (LWM-7B)", "in-domain", (50.0, 29.2, 29.2, 29.2), 34.4, "LAPA, arXiv 2410.11758", _BREAKS),
    Peer("LAPA (Bridge)", "in-domain", (70.8, 45.8, 54.2, 58.3), 57.3, "LAPA, arXiv 2410.11758", _BREAKS),
    Peer("OpenVLA fine-tuned", "in-domain", (37.5, 50.0, 41.6, 16.7), 36.4, "LAPA, arXiv 2410.11758", _BREAKS),
    Peer("Scratch-FM", "in-domain", _NONE, 41.7, "ViPRA, arXiv 2511.07732", "not stated"),
    Peer("ViPRA-FM", "in-domain", _NONE, 62.5, "ViPRA, arXiv 2511.07732", "not stated"),
    Peer("ViPRA-AR", "in-domain", _NONE, 69.8, "ViPRA, arXiv 2511.07732", "not stated"),
)
