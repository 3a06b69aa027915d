"""Whole weights out of a model in partitions."""

from dskd.assemble import assemble
from dskd.config.load import load_run
from dskd.engine.zero import whole_state


def test_a_model_is_copied_a_layer_at_a_time(make_run, tmp_path, ranks):
    engine = {"zero_stage": 3, "precision": "fp32", "persistence_threshold": 0}
    student = assemble(load_run(make_run(tmp_path, engine=engine)), ranks).distiller.student
    whole = []

    def copy(tensor):
        whole.append(sum(weight.numel() for weight in student.parameters()))  # one in partitions is empty
        return tensor.detach().clone()

    state = whole_state(student, True, copy)
    layers = [sum(weight.ds_numel for weight in part.parameters(recurse=False)) for part in student.modules()]
    assert max(whole) == max(layers) < sum(layers) / 2
    assert sum(tensor.numel() for tensor in state.values()) == sum(layers)
    assert sum(weight.numel() for weight in student.parameters()) == 0
