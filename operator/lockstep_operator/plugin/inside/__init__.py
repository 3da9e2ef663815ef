"""Programs of the standard library alone that the plugin runs inside a group's first pod, as `python3 -c`."""
