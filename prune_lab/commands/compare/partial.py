"""Runs that used only part of the images: trainer.limit_eval_batches, trainer.limit_train_batches."""

from __future__ import annotations

from prune_lab.commands.compare.runs import RunResult


def evaluated(run: RunResult) -> str | None:
    """Return the part of the evaluation images that was used, such as "2,000 of 10,000"; None: all of them."""
    split, key = ("test", "data/num_test") if "test/top1" in run.summary else ("final", "data/num_eval")
    images, total = run.summary.get(f"{split}/images"), run.summary.get(key)
    if images is None or total is None:  # written before runs recorded it
        trainer = run.options("trainer")
        limit, size = trainer.get("limit_eval_batches"), trainer.get("eval_batch_size")
        if limit is None or size is None:
            return None
        images, total = limit * size, run.options("dataset").get("num_test")
    return _part(images, total)


def trained(run: RunResult) -> str | None:
    """Return the part of the training images that an epoch used; None: all except an incomplete last batch."""
    if "train/images_per_epoch" in run.summary:
        images, total = run.summary["train/images_per_epoch"], run.summary.get("data/num_train")
        return None if images is None else f"{images:,} of {total:,}"
    limit, batch, data = (
        run.options("trainer").get("limit_train_batches"),
        run.options("schedule").get("batch_size"),
        run.options("dataset"),
    )
    if limit is None or batch is None:
        return None
    total = data.get("num_train")
    if total is not None:
        total -= round(total * (data.get("validation") or 0.0))
    return _part(limit * batch, total and total // batch * batch, shown=total)


def _part(images: int, total: int | None, *, shown: int | None = None) -> str | None:
    """Return "IMAGES of TOTAL"; None if that is all, and a bound if the total is unknown.

    Args:
        shown: the total as written in the text.
    """
    if total is None:
        return f"at most {images:,}"
    return None if images >= total else f"{images:,} of {shown or total:,}"
