"""A crew for tests of the shared memory: jobs that are given back or changed."""

import time


def work(job, shared):
    """Dispatch on the job's first word."""
    what, *rest = job
    if what == "echo":
        return rest
    if what == "add":
        return [a + shared for a in rest]
    if what == "spoil":
        rest[0][:] = 0
        return rest[0]
    if what == "sleep":
        time.sleep(rest[0])
        return rest
    if what == "write shared":
        shared[0] = 1
        return None
    raise ValueError(what)
