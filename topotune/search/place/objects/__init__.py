"""A search's results in an object store: ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``.

Each machine works in a folder of its own with the layout of
:mod:`topotune.search.place.folder`, and the same layout lies as objects below ``ADDRESS/NAME/``::

    $TOPOTUNE_SCRATCH (~/.cache/topotune)
      stores/DIGEST/NAME/...               where commands and the driver work
      workers/DIGEST/NAME/trials/0007/...  where this node's workers train; gone with the trial

Only the layer here knows of objects: everything else reads and writes those folders.

**Every file has one writer** (:mod:`~topotune.search.place.objects.layout`), so nothing is merged.
A trial's worker writes its checkpoint, its output, why it ended, and a trace an epoch; the driver
everything else. The driver also deletes a worker's files when the worker is done: checkpoints that
are not among the best, traces that are joined, a crash note that is read. Locks, half-written files
and a checkpoint's predecessor, which guards against a torn file, stay on their machine: an object
is whole or absent.

**Who may write** is said by a claim, an object with a fencing token: ``driver.claim`` of the search
and ``worker.claim`` of each trial. A writer begins by writing its own, and stops where it finds
another's. A machine that finds its own last claim there holds at least what the store does and goes
on from its folder; otherwise the store counts and the folder is replaced. Two drivers are kept
apart before that by a lease in the study's database (:mod:`topotune.search.place.row_lease`).

**An epoch is in the store before the driver hears of it**: first what belongs to it (traces), then
its checkpoint, whose history holds it. A worker that dies in between is survived at each point:
until the checkpoint is there, the epoch has never been, and the next worker trains it; once it is,
the next worker reports it again, stamp and all, and continues after it. An ended trial's checkpoint
is deleted only when the store has the outbox with all that was recorded of the trial, so that a
driver that is lost with its disk leaves one of the two.

**Cost of an epoch** by requests: one read of the claim and one write a file that changed, as a rule
checkpoint and one trace. The driver's own files go every three seconds where they have changed, a
large one less often.
"""
