"""The spare of a pod, from which its ranks are forked: `python -m lockstep_runtime.worker`, by a supervisor."""

from lockstep_runtime.worker.spare import main

if __name__ == "__main__":
    main()
