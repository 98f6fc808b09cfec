"""Right checkpoints on the wrong GPUs: nothing is planted but the way they are deployed."""

from catalogue import fault
from checkpoints import Draft

from qvalidate.targets import Deployment

ALGO = "$.quantization_config.quant_algo"


@fault("tp-heads", "$.num_attention_heads", deployment=Deployment(tp=3))
def four_heads_on_three_gpus(made: Draft) -> None:
    pass


@fault("tp-heads", "$.num_key_value_heads", deployment=Deployment(tp=4))
def three_key_heads_on_four_gpus(made: Draft) -> None:
    made.config["num_key_value_heads"] = 3


@fault("tp-size", "model.layers.0.mlp.down_proj.weight", deployment=Deployment(tp=5))
def columns_on_five_gpus(made: Draft) -> None:
    made.config["num_attention_heads"] = made.config["num_key_value_heads"] = 5


@fault("pp-layers", "$.num_hidden_layers", deployment=Deployment(pp=3))
def two_layers_on_three_gpus(made: Draft) -> None:
    pass


@fault("ep-experts", "$", deployment=Deployment(ep=2))
def no_experts_on_two_gpus(made: Draft) -> None:
    pass


@fault("ep-experts", "$.num_local_experts", model="mixtral", deployment=Deployment(ep=5))
def four_experts_on_five_gpus(made: Draft) -> None:
    pass


@fault("vllm-gpu-too-old", ALGO, algo="FP8", engine=True, deployment=Deployment(gpu=75))
def fp8_on_turing(made: Draft) -> None:
    pass


@fault(
    "vllm-gpu-fallback",
    ALGO,
    algo="NVFP4",
    severity="note",
    engine=True,
    deployment=Deployment(gpu=90),
)
def nvfp4_on_hopper(made: Draft) -> None:
    pass


@fault(
    "vllm-columns",
    "model.layers.0.self_attn.o_proj.weight",
    engine=True,
    deployment=Deployment(tp=4),
)
def half_a_block_on_each_gpu(made: Draft) -> None:
    pass
