from qwen3next_train.metrics.names import LAYER_METRICS, METRICS, NAMED_METRICS, is_metric_name, layer_metric

FROZEN = [
    "step",
    "tokens",
    "loss/lm",
    "loss/mtp",
    "loss/load_balancing",
    "loss/z",
    "loss/total",
    "optim/lr",
    "optim/grad_norm",
    "optim/skipped_steps",
    "perf/flops_per_step",
    "perf/flops_total",
    "perf/tflops_per_gpu",
    "perf/mfu",
    "perf/tokens_per_s",
    "perf/step_time_s",
    "perf/data_wait_s",
    "perf/forward_s",
    "perf/backward_s",
    "perf/optimizer_s",
    "perf/save_s",
    "perf/eval_s",
    "mem/peak_gib",
    "moe/max_violation",
    "moe/dead_experts",
    "moe/router_entropy",
    "eval/loss",
    "eval/bpb",
]


def test_the_names_are_the_contract():
    assert [metric.name for metric in METRICS] == FROZEN


def test_every_metric_is_explained_in_one_line():
    for metric in (*METRICS, *LAYER_METRICS, *NAMED_METRICS):
        assert metric.unit
        assert metric.meaning
        assert "\n" not in metric.meaning


def test_layer_names():
    assert layer_metric(7, "max_violation") == "moe/layer_07/max_violation"
    assert layer_metric(123, "dead_experts") == "moe/layer_123/dead_experts"
    for layer in (0, 9, 10, 99, 100, 1234):
        for template in LAYER_METRICS:
            assert is_metric_name(template.name.format(layer=layer))


def test_names_with_what_users_call_things():
    for template in NAMED_METRICS:
        for name in ("a", "Old-Books_2.jsonl", "9" * 64):
            assert is_metric_name(template.name.format(name=name, first=16))


def test_unknown_names():
    for name in ("eval/a b/loss", "eval/-a/bpb", "eval/a/b/loss", "data/share_", f"loss/{'a' * 65}", "eval/a/lm"):
        assert not is_metric_name(name)
    for name in ("loss", "moe/layer_7/max_violation", "moe/layer_007/max_violation", "moe/layer_07/load", "loss/lm\n"):
        assert not is_metric_name(name)
