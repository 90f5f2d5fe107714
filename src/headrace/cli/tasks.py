"""`headrace tasks`: what can be rolled out here, and what needs a download first."""


def tasks(*, all: bool = False) -> int:
    """List tasks, their success rule and step limit, and the command that fetches what is missing.

    Args:
        all: Also list every environment that ManiSkill registers.
    """
    from headrace.sim.simpler import GOOGLE_ROBOT
    from headrace.sim.tasks import GROUPS, find_task, known_tasks, maniskill_registry

    names = list(known_tasks())
    if all:
        names += sorted(set(maniskill_registry()) - set(names))
    width = max(len(name) for name in names)
    for name in names:
        task = find_task(name)
        missing = task.missing()
        marks = f"{task.max_steps:>4} steps, {task.success_rule:<6}  {'expert' if task.expert else '      '}"
        print(f"{name:<{width}}  {marks}  {'needs: ' + missing if missing else task.instruction}")
    for name, lacks in GOOGLE_ROBOT.items():
        print(f"{name:<{width}}  {lacks}")
    print("\ngroups: " + "; ".join(f"{name} = {', '.join(members)}" for name, members in GROUPS.items()))
    return 0
