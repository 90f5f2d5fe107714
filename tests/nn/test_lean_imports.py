import subprocess
import sys

import pytest

from headrace.nn.lean_imports import without


def test_a_hidden_package_is_back_afterwards():
    sys.modules.pop("this", None)
    with without("this", "json"):
        import json  # noqa: F401  (was there before: stays)

        with pytest.raises(ImportError):
            import this  # noqa: F401
    assert "this" not in sys.modules and sys.modules["json"] is not None


def test_a_policy_loads_neither_wandb_nor_scikit_learn():
    code = "import sys, headrace.robot.policy; print([m for m in ('wandb', 'sklearn', 'pandas') if sys.modules.get(m)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
