"""One line for tables, pages and plots that show results whose inputs have changed since."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.results.tables import Found
from mambapeft_vision.run.inputs import Fingerprints, Inputs, changed
from mambapeft_vision.run.run_config import RunPlan
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.identity import NAMED_WEIGHTS


def outdated_note(found: Iterable[Found]) -> str:
    """How many results were made from other inputs than those present now; "" if none is known to be.

    Only results in run folders are compared: with the lists of images, the weights and the Python files that their
    configs name. Of weights, only the user's own files are compared. Bundled results and missing inputs are not.
    """
    results = list(found)
    inputs, known = Inputs(), dict[str, Fingerprints]()
    counts: Counter[str] = Counter()
    for one in results:
        if one.folder is not None:
            key = _key(one.record)
            if key not in known:
                known[key] = _now(one.record, inputs)
            counts[changed(Fingerprints.of_record(one.record), known[key])] += 1
    del counts[""]
    if not counts:
        return ""
    what = ", ".join(f"{count:,} of other {words}" for words, count in sorted(counts.items()))
    return (
        f"{counts.total():,} of {len(results):,} results were made from inputs that have changed since: {what}; "
        "run their commands again to renew them"
    )


def _key(record: RunRecord) -> str:
    """A key that results share if they are compared with the same files."""
    sections = [record.config.get(name) for name in ("dataset", "backbone", "method", "paths")]
    without_seed = {k: v for k, v in (sections[0] or {}).items() if k != "seed"}
    return json.dumps([without_seed, *sections[1:]], sort_keys=True, default=str)


def _now(record: RunRecord, inputs: Inputs) -> Fingerprints:
    try:
        paths = {name: record.config["paths"].get(name) for name in ("data", "outputs", "methods", "backbones")}
        config = {**record.config, "paths": {**paths, "cache": None}}
        plan = RunPlan(config, TrainerConfig(), record.fingerprint, Path(str(paths["outputs"])))
        # Named weights do not change, and are costly to build and hash; files of backbones would be run.
        builds = plan.backbone.get("weights") not in NAMED_WEIGHTS and paths["backbones"] is None
        return inputs.of(plan, with_weights=builds, with_content=False)
    except (UserError, OSError, KeyError, TypeError, AttributeError):  # an older layout, or a file that cannot be read
        return Fingerprints(None, None, None)
