"""Models behind plan.py: memory and speed of a training run from its flags. docs/planner.md explains every formula."""
