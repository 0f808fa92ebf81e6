"""Convert a model folder to OpenVINO's form with optimum-intel; run in the environment of the OpenVINO peer.

python openvino_export.py MODEL_FOLDER TARGET_FOLDER fp32|int8|int4
"""

from __future__ import annotations

import sys

INT4_GROUP_LEN = 32  # as in GGUF's four-bit types; the usual 128 does not divide the widths of small models


def export(model: str, target: str, weight_type: str) -> None:
    """Convert `model` into the folder `target` with weights stored as `weight_type`.

    Raises:
        ValueError: `weight_type` is none of fp32, int8, int4.
    """
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    configs = {
        "fp32": None,
        "int8": OVWeightQuantizationConfig(bits=8, sym=False),
        "int4": OVWeightQuantizationConfig(bits=4, sym=False, group_size=INT4_GROUP_LEN, ratio=1.0),
    }
    if weight_type not in configs:
        raise ValueError(f"the weight type must be one of {', '.join(configs)}, got {weight_type!r}")
    converted = OVModelForCausalLM.from_pretrained(
        model,
        export=True,
        compile=False,
        load_in_8bit=False,
        quantization_config=configs[weight_type],
        local_files_only=True,
    )
    converted.save_pretrained(target)


if __name__ == "__main__":
    export(*sys.argv[1:])
