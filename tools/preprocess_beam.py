"""Preprocesses with Apache Beam: the shards of the verb `preprocess`, on whatever Beam runs on.

    python tools/preprocess_beam.py --config=configs/FILE.py:WORDS --workdir=FOLDER -- BEAM OPTIONS
    ... -- --runner=DirectRunner --direct_num_workers=4 --direct_running_mode=multi_processing

Beam wants older versions of what JAX needs, so it has an environment of its own, without JAX:

    uv venv beam
    uv pip install --python beam/bin/python apache-beam array-record blosc2 nibabel scipy
    uv pip install --python beam/bin/python jaxtyping ml-collections absl-py rich

The folders must be the same for all workers. Shards are byte for byte those of the verb if numpy,
scipy and blosc2 have the versions of uv.lock.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from absl import app, flags
from apache_beam.options.pipeline_options import PipelineOptions

sys.path.insert(0, str(Path(__file__).parents[1]))
from bhsd_jax import overrides
from bhsd_jax.platform import faults
from bhsd_jax.verbs import preprocess

CONFIG = overrides.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run.", required=True)


class BeamPool:
    """Runs the two passes of `preprocess` as a pipeline each."""

    def __init__(self, options: Sequence[str]):
        self.options = list(options)

    def __enter__(self) -> "BeamPool":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def each(
        self, function: Callable[[Any], Any], jobs: Sequence[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """Pairs of job and result; the result is what the second call reads from the files."""
        if jobs:
            with beam.Pipeline(options=PipelineOptions(self.options)) as pipeline:
                pipeline | beam.Create(jobs) | beam.Reshuffle() | beam.Map(function)
        yield from ((job, function(job)) for job in jobs)


def main(argv: Sequence[str]) -> None:
    """Preprocesses; says what is wrong and exits 1 where it cannot."""
    try:
        preprocess.run(CONFIG.value, Path(WORKDIR.value), BeamPool(argv[1:]))
    except (ValueError, OSError) as error:
        known = isinstance(error, OSError) and faults.explain(error, Path(WORKDIR.value))
        sys.exit(f"preprocess: {known or error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
