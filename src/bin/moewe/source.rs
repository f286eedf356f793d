//! The layer that `run` runs: of a checkpoint, or the one that is built in.

use std::borrow::Cow;
use std::path::Path;

use moewe::families::Request;
use moewe::spec::{ActivationCode, ActivationQuant, ActivationScale, FloatType, ScaleRule, ScaleSpan};
use moewe::{Checkpoint, Error, Result, Unsupported};
use serde_json::Value;

/// The golden case deepseek_v3: random weights in the layout of the published checkpoint.
const CONFIG: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/deepseek_v3/config.json"));
const WEIGHTS: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/deepseek_v3/weights.safetensors"));

/// Opens a checkpoint, or the sample.
///
/// # Errors
/// Those of [`Checkpoint::open`].
pub fn open(folder: Option<&Path>) -> Result<Checkpoint> {
    match folder {
        Some(folder) => Checkpoint::open(folder),
        None => Checkpoint::from_bytes(CONFIG, vec![("weights.safetensors".into(), Cow::Borrowed(WEIGHTS))]),
    }
}

/// What is asked of the checkpoint: hidden states in its own type, an f32 output.
///
/// # Errors
/// A type or an `--activations` that has no implementation.
pub fn request(checkpoint: &Checkpoint, layer: Option<usize>, activations: &str) -> Result<Request> {
    let (input, output) = (dtype(checkpoint)?, FloatType::F32);
    Ok(Request { layer, input, output, activations: activation_quant(activations)? })
}

/// `--activations`. Groups of 128 columns, as every published block-FP8 model has, unless it says another.
fn activation_quant(value: &str) -> Result<ActivationQuant> {
    let group = |columns, scale| ActivationQuant::dynamic_fp8(columns, scale);
    let whole = |code, span| {
        let (rule, scale) = (ScaleRule::FlooredAmax, ActivationScale::F32);
        ActivationQuant::Dynamic { code, span, rule, scale }
    };
    match value {
        "none" => Ok(ActivationQuant::None),
        "dynamic" => Ok(group(128, ActivationScale::F32)),
        "dynamic-ue8m0" => Ok(group(128, ActivationScale::F32CeilPow2)),
        "dynamic-64" => Ok(group(64, ActivationScale::F32)),
        "token" => Ok(whole(ActivationCode::E4m3, ScaleSpan::Token)),
        "tensor" => Ok(whole(ActivationCode::E4m3, ScaleSpan::Tensor)),
        "int8" => Ok(whole(ActivationCode::Int8, ScaleSpan::Token)),
        "static" => Ok(ActivationQuant::Static { code: ActivationCode::E4m3 }),
        other => Err(unsupported(
            "--activations",
            other,
            "there are none, dynamic, dynamic-ue8m0, dynamic-64, token, tensor, int8 and static",
        )),
    }
}

/// `dtype`, which older files call `torch_dtype`; the text part's before the whole model's.
fn dtype(checkpoint: &Checkpoint) -> Result<FloatType> {
    let whole = checkpoint.config();
    let text = whole.get("text_config").and_then(Value::as_object);
    let objects = [text, Some(whole)];
    let found = objects.into_iter().flatten().flat_map(|object| [object.get("dtype"), object.get("torch_dtype")]);
    match found.flatten().find(|value| !value.is_null()) {
        None => Ok(FloatType::Bf16),
        Some(value) => match value.as_str() {
            Some("bfloat16") => Ok(FloatType::Bf16),
            Some("float16") => Ok(FloatType::F16),
            Some("float32") => Ok(FloatType::F32),
            Some(_) | None => {
                Err(unsupported("dtype", &value.to_string(), "hidden states are bfloat16, float16 or float32"))
            }
        },
    }
}

fn unsupported(field: &'static str, value: &str, because: &'static str) -> Error {
    let (backend, field) = ("moewe run".into(), field.into());
    Error::Unsupported(Unsupported { backend, field, value: value.to_owned(), because: because.into() })
}
