"""A smaller adapter from the weights alone: no base model, no examples, nothing measured."""

from __future__ import annotations

from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import PruneResult
from lorazor.measure.meter import Variant
from lorazor.runs import RunFolder
from lorazor.select.goal import Goal, default_score
from lorazor.select.scoring import Scoring, score_named
from lorazor.select.search import Family, Units
from lorazor.settings import ShrinkSettings
from lorazor.train.warmup import SCORES_FILE
from lorazor.workflow.basis import Basis
from lorazor.workflow.candidates import gates_for
from lorazor.workflow.written import writer_for


def shrink_by_weights(
    run: RunFolder, folder: AdapterFolder, goal: Goal, settings: ShrinkSettings
) -> tuple[str, PruneResult | None]:
    """Choose, and write.

    Args:
        run: where the result goes.
        folder: the adapter.
        goal: a size.
        settings: what to choose among, and by.
    Returns:
        Why this adapter, in a sentence, and what was written; None where nothing was dropped.
    """
    parts = Parts(folder.sites)
    name = settings.score or default_score(settings.by, folder.sites, has_data=False)
    scores = score_named(name)(Scoring(parts, folder, seed=settings.seed))
    units = Units.of(parts, settings.by, settings.stack)
    chosen = Variant("chosen", gates_for(goal, Family.of(units, scores.values), scores))
    share = parts.n_parameters_kept(chosen.gates) / sum(parts.n_parameters)
    writer = writer_for(run, folder, Basis("singular", name, scores, {}), goal, settings)
    n_kept = parts.n_sites_kept(chosen.gates)
    reason = (
        f"{n_kept} of {len(parts.sites)} sites with {share:.1%} of the parameters{writer.in_dtype}, by {name}. "
        "Nothing was measured: pass --data to know what it costs."
    )
    run.write_rows(SCORES_FILE, scores.by_site())
    if writer.is_same(chosen):
        return reason, None
    return reason, writer.write(chosen, run.path / "adapter", reason, is_chosen=True)
