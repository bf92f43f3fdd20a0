"""Hard ways of asking, which never occur in training and hide the task: does the task level help then?"""

import copy

from ml_collections import ConfigDict

from tghmoe_jax.datasets.sources import HARD_WORDINGS, finding_parser, make_source
from tghmoe_jax.evaluation import protocols, router_tests
from tghmoe_jax.reader.batches import Request
from tghmoe_jax.reader.examination import questions, routed_right
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.samples.questions import TYPES
from tghmoe_jax.samples.tasks import TASK_OF, TASKS


def hard_questions(reader: Reader, config: ConfigDict, progress=print) -> dict[str, dict[str, object]]:
    """{way of asking: scores of `router_tests.score_way`}: the wordings of training, unseen ones and the hard ones."""
    e, tasks = config.eval, reader.tasks
    reader = copy.copy(reader)
    reader.text_length *= 2  # indications are long, and other languages fall to bytes
    ways, parse = {}, finding_parser(config.data.name)
    for way in ("seen", "unseen", *HARD_WORDINGS):
        source = make_source(config.data, "test", e.adversarial, way)
        routed: dict[str, dict[str, list]] = {"oracle": {}, "wrong": {}}
        hits = {}
        for kind, types in (("closed", TYPES), ("report", [None])):
            asked = questions(source, kind, e.adversarial, e.seed + 4, types)
            hits[kind] = routed_right(reader, source, asked)
            if kind == "closed":
                hits["open"] = routed_right(reader, source, [(i, q.without_choices()) for i, q in asked])
            for step, run in enumerate(routed.values()):
                requests = [Request(i, q, group=(tasks.index(q.task) + step) % len(tasks)) for i, q in asked]
                answers = reader.answer(source, requests, e[TASKS[TASK_OF[kind]].budget])
                run[kind] = [
                    protocols.Prediction.of(
                        i, q, answer.text,
                        findings_true=source.findings(i) if kind == "report" else None,
                        findings_stated=parse(answer.text) if kind == "report" else None,
                    )
                    for (i, q), answer in zip(asked, answers, strict=True)
                ]  # fmt: skip
        ways[way] = router_tests.score_way(routed["oracle"], routed["wrong"], hits)
        progress(f"asked in another way, {way}: {2 * e.adversarial} items")
    return ways
