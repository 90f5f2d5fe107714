"""LeRobot's asynchronous server with this policy: `python -m lerobot_policy_vipra.serve --host=127.0.0.1 --port=8080`.

The server of 0.6.1 neither looks for plugins nor takes types that are not on its list. Its messages are unauthenticated
pickles: bind it to this machine or to a private network only.
"""

from lerobot.async_inference import constants, policy_server

from lerobot_policy_vipra.configuration_vipra import LeRobotVipraConfig


def allow() -> None:
    """Put this policy on the server's list."""
    kind = LeRobotVipraConfig.get_choice_name(LeRobotVipraConfig)
    if kind not in constants.SUPPORTED_POLICIES:
        constants.SUPPORTED_POLICIES.append(kind)


if __name__ == "__main__":
    allow()
    policy_server.serve()
