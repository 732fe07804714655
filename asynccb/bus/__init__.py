"""How an event gets from the training thread to the callbacks. Theory of operation.

::

    training thread                                   |  event loop
                                                      |
    dispatch: runs the inline hooks, in list order    |
      └─ appends the event to the mailbox of each     |
         callback that wants it, and to the ring      |
      └─ wakeup: one flag for the whole run  ────────►|  at once, or 5 ms later for batch events
                                                      |    └─ wakes the consumers that have mail
                                                      |         └─ each runs its hooks in order, one at a time
                                                      |    └─ wakes the readers of event streams

One mailbox and one long-lived task for each callback, so that a slow callback holds nobody but itself, and
one event object for all of them. The training thread pays an append for each mailbox and one test of the
flag; ``call_soon_threadsafe``, which writes to a socket and gives the interpreter lock away, happens once for
all that is appended until the loop comes.

Order: a callback sees the events in the order in which they happened, none twice. Between callbacks nothing
is promised, except that all inline hooks of an event have run before any awaitable of it starts.

Loss: none with ``overflow = "wait"``; counted with the others. What a cancelled run could not deliver within
its grace period is said when it ends.

Blocking: the training thread blocks only in ``control.wait``. The loop is held at most about a millisecond by
consecutive hooks of one callback that never suspend.
"""
