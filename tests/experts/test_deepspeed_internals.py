"""What expert parallelism uses of DeepSpeed without a public name: when an upgrade breaks it, these say what."""

import inspect
from importlib.metadata import version

from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage3
from deepspeed.utils import groups


def test_the_version_is_the_one_whose_internals_were_read():
    assert version("deepspeed").startswith("0.19."), (
        "train/model/, train/checkpoints/streaming.py and resume.py use internals of DeepSpeed 0.19: read them again, "
        "run tests/experts/test_parity.py, and only then raise the version here and in pyproject.toml"
    )


def test_groups_of_experts_have_their_names():
    for name in ("_create_expert_and_data_parallel", "_get_expert_parallel_group", "_get_expert_data_parallel_group"):
        assert callable(getattr(groups, name, None)), (
            f"deepspeed.utils.groups.{name} is gone (train/model/text_model.py)"
        )


def test_zero_3_partitions_a_tagged_parameter_over_its_own_group():
    read = {
        "ds_zero_partition_process_group": partition_parameters.Init._convert_to_deepspeed_param,
        "ds_zero_placement_family": stage3.DeepSpeedZeroOptimizer_Stage3._autoep_expert_parallel_group,
        "ds_zero_partition_group_name": stage3.DeepSpeedZeroOptimizer_Stage3._autoep_expert_parallel_group,
    }
    for tag, function in read.items():
        assert tag in inspect.getsource(function), f"ZeRO-3 no longer reads {tag} (train/model/text_model.py, add_lora)"


def test_gradients_of_a_tagged_parameter_are_averaged_over_all_ranks():
    assert hasattr(stage3.DeepSpeedZeroOptimizer_Stage3, "_gradient_averaging_world_size"), (
        "gradients of experts would be scaled otherwise (train/model/text_model.py, add_lora)"
    )


def test_a_parameter_can_be_materialized_as_a_shard():
    convert = getattr(partition_parameters.Init, "_convert_to_deepspeed_param", None)
    assert convert, "zero.Init lost _convert_to_deepspeed_param (train/checkpoints/streaming.py)"
    source = inspect.getsource(convert)
    for name in ("aligned_size", "partition"):
        assert f"param.{name} = " in source, f"a parameter lost {name} (train/checkpoints/streaming.py)"
    assert hasattr(partition_parameters, "free_param")
    assert hasattr(partition_parameters.PartitionedParamStatus, "AVAILABLE")


def test_the_optimizer_keeps_its_flat_partitions_where_resume_looks():
    source = inspect.getsource(stage3.DeepSpeedZeroOptimizer_Stage3.__init__)
    assert "self.fp32_partitioned_groups_flat" in source, "train/checkpoints/resume.py, restore"
    assert "self.persistent_parameters" in source, "train/checkpoints/resume.py, start_over"


def test_generation_can_gather_parameters_outside_of_an_engine_s_forward():
    source = inspect.getsource(parameter_offload)
    assert "_parameters._in_forward" in source, "train/evaluation/generation.py"
