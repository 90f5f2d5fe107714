"""`headrace serve`: answer observations over a websocket, in openpi's protocol."""

import asyncio
import os
from pathlib import Path
from typing import Annotated

import tyro


def serve(
    policy: Annotated[str, tyro.conf.Positional],
    /,
    *,
    port: int = 8000,
    host: str = "127.0.0.1",
    token_file: Path | None = None,
    max_batch: int = 16,
    wait: float = 0.004,
    steps: int | None = None,
    execute: int | None = None,
    precision: str = "fp32",
) -> int:
    """Serve a policy until interrupted; /healthz and /metrics answer plain requests on the same port.

    Off loopback a token is needed: from --token-file, or from the environment variable HEADRACE_TOKEN.

    Args:
        policy: Checkpoint folder or hub id.
        port: 0 takes a free port and prints it.
        host: Address to listen on.
        token_file: File whose first line is the token that clients must send.
        max_batch: Most observations in one call of the policy.
        wait: Longest wait for more observations [s].
        steps: Equal solver steps; without this, as saved with the checkpoint, else 10.
        execute: Actions of each chunk that are sent; all of them by default.
        precision: `fp32` or `bf16`.
    """
    from headrace.flow.solver import SolverSettings
    from headrace.nn.fingerprint import folder_fingerprint
    from headrace.nn.pretrained import resolve_folder
    from headrace.robot.chunking import RecedingHorizon
    from headrace.robot.policy import load_policy
    from headrace.robot.server import ServerConfig

    settings = {"steps": steps, "execute": execute, "precision": precision}
    config = ServerConfig(
        host=host,
        port=port,
        token=read_token(token_file),
        name=Path(policy).name,
        checkpoint=folder_fingerprint(resolve_folder(policy)),
        settings={key: value for key, value in settings.items() if value is not None},
        max_batch=max_batch,
        wait=wait,
    )
    solver = None if steps is None else SolverSettings(method="euler", steps=steps)
    loaded = load_policy(policy, solver=solver, precision=precision)
    return asyncio.run(_serve(RecedingHorizon(loaded, execute) if execute else loaded, config))


async def _serve(policy, config) -> int:
    from headrace.robot.server import PolicyServer

    async with PolicyServer(policy, config) as server:
        print(f"serving {config.name} on ws://{config.host}:{server.port} (stop with Ctrl-C)", flush=True)
        await asyncio.Event().wait()
    return 0


def read_token(path: Path | None) -> str:
    """The token from a file, or from HEADRACE_TOKEN, or an empty text.

    Raises:
        ValueError: The file is empty.
    """
    if path is None:
        return os.environ.get("HEADRACE_TOKEN", "")
    token = path.read_text().strip().split("\n")[0]
    if not token:
        raise ValueError(f"{path} is empty; its first line must be the token")
    return token
