//! `quantization_config`: what a checkpoint says about its quantised weights. What a tensor is, its dtype and the
//! tensors beside it say (`tensors.rs`); both have to agree.

use serde_json::Value;

use super::config::{Config, TextConfig};
use super::irrelevant;
use crate::error::{Error, Result};
use crate::spec::MAX_WIDTH;

/// What a `quantization_config` says.
#[derive(Debug, Clone)]
pub(super) struct Quantization {
    /// `quant_method`.
    pub(super) method: &'static str,
    /// How weights may be stored.
    pub(super) schemes: Vec<Scheme>,
    /// How the model's authors quantise activations: the key that says it.
    pub(super) activations: Option<String>,
    /// The type that scales fit.
    pub(super) scale_fmt: Option<&'static str>,
    /// What the routed experts are, where DeepSeek says it.
    pub(super) expert_dtype: Option<&'static str>,
}

/// One way to store weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// E4M3 codes and a scale for so many rows and columns.
    Fp8Block([usize; 2]),
    /// E4M3 codes and one scale.
    Fp8Tensor,
    /// E4M3 codes and a scale a row.
    Fp8Channel,
    /// E4M3 codes and an exponent for 32 columns.
    Mxfp8,
    /// INT8 codes and a scale a row.
    Int8,
    /// E2M1 codes and an exponent for 32 columns.
    Mxfp4,
    /// E2M1 codes, an E4M3 scale for 16 columns, an f32 one for all.
    Nvfp4,
    Int4(Int4),
}

/// Codes of four bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Int4 {
    pub(super) packing: Packing,
    /// Columns that share a scale; `None` for all.
    pub(super) group: Option<usize>,
    pub(super) symmetric: bool,
    /// Whether groups need not be runs of columns.
    pub(super) act_order: bool,
}

/// Who packed codes of four bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    CompressedTensors,
    Gptq {
        /// Whether zeros are stored less 1.
        zeros_less_one: bool,
    },
    Awq,
}

const METHODS: &[&str] = &["fp8", "mxfp8", "mxfp4", "modelopt", "compressed-tensors", "gptq", "awq"];
const EXPERT_DTYPES: &[&str] = &["fp8", "fp4"];
/// What ModelOpt calls its schemes.
const ALGORITHMS: &[&str] =
    &["NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "W4A8_MXFP4_FP8", MIXED];
const MIXED: &str = "MIXED_PRECISION";
/// What compressed-tensors calls its.
const FORMATS: &[&str] = &[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp8-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
];

impl Quantization {
    /// Reads the object, and the names of its keys that nobody knows. `top` is the config of the text model.
    pub(super) fn read(family: &str, text: &TextConfig<'_>, top: &Config<'_>) -> Result<(Option<Self>, Vec<String>)> {
        let outside = top.optional_word("expert_dtype", EXPERT_DTYPES)?;
        let map = match text.either("quantization_config")? {
            None | Some(Value::Null) => return Ok((None, Vec::new())),
            Some(Value::Object(map)) => map,
            Some(value) => {
                return Err(Error::invalid(
                    "quantization_config",
                    super::config::show(value),
                    "an object or null",
                    "correct the key in config.json",
                ));
            }
        };
        let config = Config::new(family, "quantization_config.", map);
        // First, for the other keys mean nothing under another method. ModelOpt's own file has none.
        let method = match !config.has("quant_method") && config.has("quantization") {
            true => "modelopt",
            false => config.word("quant_method", METHODS)?,
        };
        let inside = config.optional_word("expert_dtype", EXPERT_DTYPES)?;
        let expert_dtype = match (inside, outside) {
            (Some(inside), Some(outside)) if inside != outside => {
                return Err(config.contradiction(
                    "expert_dtype",
                    inside,
                    format!("expert_dtype = {outside} beside it"),
                ));
            }
            (Some(dtype), _) | (None, Some(dtype)) => Some(dtype),
            (None, None) => None,
        };
        let (mut schemes, activations) = match method {
            "fp8" => fp8(&config, expert_dtype)?,
            "mxfp8" => mxfp8(&config)?,
            "mxfp4" => (vec![Scheme::Mxfp4], None),
            "modelopt" => modelopt(&config)?,
            "compressed-tensors" => compressed_tensors(&config)?,
            "gptq" => (vec![gptq(&config)?], None),
            _ => (vec![awq(&config)?], None),
        };
        let mut unique: Vec<Scheme> = Vec::new();
        schemes.retain(|scheme| {
            let new = !unique.contains(scheme);
            unique.push(*scheme);
            new
        });
        let scale_fmt = config.optional_word("scale_fmt", &["ue8m0"])?;
        let quantization = Self { method, schemes, activations, scale_fmt, expert_dtype };
        Ok((Some(quantization), config.unknown(&[irrelevant::QUANTIZATION])))
    }
}

type Read = Result<(Vec<Scheme>, Option<String>)>;

/// DeepSeek's and Qwen's: without a block size a matrix has one scale, or a row has.
fn fp8(config: &Config<'_>, expert_dtype: Option<&str>) -> Read {
    config.optional_word("fmt", &["e4m3"])?;
    let mut schemes = match block(config, "weight_block_size")? {
        Some(block) => vec![Scheme::Fp8Block(block)],
        None => vec![Scheme::Fp8Tensor, Scheme::Fp8Channel],
    };
    if expert_dtype == Some("fp4") {
        schemes.push(Scheme::Mxfp4);
    }
    Ok((schemes, activation_scheme(config)?))
}

fn mxfp8(config: &Config<'_>) -> Read {
    config.optional_word("fmt", &["e4m3"])?;
    let key = "weight_block_size";
    match block(config, key)? {
        None | Some([1, 32]) => Ok((vec![Scheme::Mxfp8], activation_scheme(config)?)),
        Some([rows, columns]) => {
            Err(config.contradiction(key, format!("[{rows}, {columns}]"), "[1, 32] in MXFP8, or no such key"))
        }
    }
}

fn activation_scheme(config: &Config<'_>) -> Result<Option<String>> {
    let scheme = config.optional_word("activation_scheme", &["dynamic", "static"])?;
    Ok(scheme.map(|scheme| format!("activation_scheme = {scheme}")))
}

/// Rows and columns that share a scale: two numbers, or one for both. Absent and null mean no blocks.
fn block(config: &Config<'_>, key: &'static str) -> Result<Option<[usize; 2]>> {
    let size = |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| legal(*size));
    let Some(value) = config.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
    let found = match value {
        Value::Number(_) => size(value).map(|size| [size, size]),
        Value::Array(list) => match list.as_slice() {
            [rows, columns] => size(rows).zip(size(columns)).map(|(rows, columns)| [rows, columns]),
            _ => None,
        },
        Value::Null | Value::Bool(_) | Value::String(_) | Value::Object(_) => None,
    };
    let expected = format!("a number of rows and one of columns, from 1 to {MAX_WIDTH}, or null");
    found.map(Some).ok_or_else(|| config.wrong(key, value, &expected))
}

fn legal(size: usize) -> bool {
    (1..=MAX_WIDTH).contains(&size)
}

/// Columns that share a scale; -1 means all.
fn group(config: &Config<'_>, keys: &[&'static str]) -> Result<Option<usize>> {
    match config.signed(keys)? {
        (_, -1) => Ok(None),
        (key, size) => match usize::try_from(size).ok().filter(|size| legal(*size)) {
            Some(size) => Ok(Some(size)),
            None => Err(config.wrong(key, &size.into(), &format!("-1, or 1 to {MAX_WIDTH} columns"))),
        },
    }
}

/// Integers of other sizes have no kernel.
fn four_bits(config: &Config<'_>, keys: &[&'static str]) -> Result<()> {
    match config.count(keys)? {
        4 => Ok(()),
        bits => {
            let key = keys.iter().find(|key| config.has(key)).copied().unwrap_or_default();
            Err(config.unsupported(key, &bits.into(), "only 4 bits are implemented"))
        }
    }
}

fn modelopt(config: &Config<'_>) -> Read {
    let algorithms = match config.has("quantization") {
        true => config.object("quantization", irrelevant::QUANTIZATION, algorithms)?,
        false => algorithms(config)?,
    };
    let scheme = |algorithm: &&str| match *algorithm {
        "NVFP4" | "W4A16_NVFP4" => Scheme::Nvfp4,
        "FP8" => Scheme::Fp8Tensor,
        "FP8_PER_CHANNEL_PER_TOKEN" => Scheme::Fp8Channel,
        "MXFP8" => Scheme::Mxfp8,
        _ => Scheme::Mxfp4,
    };
    let quantises = algorithms.iter().find(|algorithm| **algorithm != "W4A16_NVFP4");
    let activations = quantises.map(|algorithm| format!("activation quantisation by quant_algo = {algorithm}"));
    Ok((algorithms.iter().map(scheme).collect(), activations))
}

/// One for all modules, or several.
fn algorithms(config: &Config<'_>) -> Result<Vec<&'static str>> {
    let one = |config: &Config<'_>, known: &[&'static str]| {
        let algorithm = config.word("quant_algo", known)?;
        let size = if config.has("group_size") { group(config, &["group_size"])? } else { None };
        match (algorithm, size) {
            ("NVFP4" | "W4A16_NVFP4", Some(size)) if size != 16 => {
                Err(config.contradiction("group_size", size.to_string(), "16 in NVFP4"))
            }
            ("MXFP8" | "W4A8_MXFP4_FP8", Some(size)) if size != 32 => {
                Err(config.contradiction("group_size", size.to_string(), "32 in MX formats"))
            }
            (algorithm, _) => Ok(algorithm),
        }
    };
    match one(config, ALGORITHMS)? {
        MIXED => {
            let known: Vec<&'static str> = ALGORITHMS.iter().copied().filter(|algorithm| *algorithm != MIXED).collect();
            config.objects("quantized_layers", irrelevant::QUANTIZATION, |layer| one(layer, &known))
        }
        algorithm => Ok(vec![algorithm]),
    }
}

fn compressed_tensors(config: &Config<'_>) -> Read {
    // Both change values, not only how they are stored.
    for (key, because) in [
        ("sparsity_config", "no sparse weights are implemented"),
        ("transform_config", "no transforms of weights are implemented"),
    ] {
        let off = |value: &Value| match value {
            Value::Null => true,
            Value::Object(map) => map.iter().all(|(key, value)| {
                (key == "format" && value == "dense")
                    || (key == "config_groups" && value.as_object().is_some_and(serde_json::Map::is_empty))
            }),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => false,
        };
        if let Some(value) = config.get(key).filter(|value| !off(value)) {
            return Err(config.unsupported(key, value, because));
        }
    }
    let format = config.optional_word("format", FORMATS)?.filter(|format| *format != "mixed-precision");
    let groups = config.objects("config_groups", irrelevant::QUANTIZATION, |group| {
        let own = if group.has("format") { group.optional_word("format", FORMATS)? } else { None };
        let scheme = match group.has("weights") {
            true => Some(group.object("weights", irrelevant::QUANTIZATION, |weights| packed(weights, own.or(format)))?),
            false => None,
        };
        let activations = group.get("input_activations").filter(|value| !value.is_null());
        Ok((scheme, activations.map(|value| format!("input_activations = {}", super::config::show(value)))))
    })?;
    let activations = groups.iter().find_map(|(_, activations)| activations.clone());
    Ok((groups.into_iter().filter_map(|(scheme, _)| scheme).collect(), activations))
}

/// The scheme of a group of modules.
fn packed(weights: &Config<'_>, format: Option<&str>) -> Result<Scheme> {
    let bits = weights.count(&["num_bits"])?;
    let kind = weights.word("type", &["int", "float"])?;
    let strategy = weights.word("strategy", &["tensor", "channel", "group", "block", "tensor_group"])?;
    let symmetric = weights.flag(&["symmetric"])?;
    weights.fixed("dynamic", false)?;
    let columns = if weights.has("group_size") { group(weights, &["group_size"])? } else { None };
    let blocks = block(weights, "block_structure")?;
    let act_order = match weights.get("actorder") {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Bool(true)) => true,
        // Of the four, the other two leave the groups runs of columns.
        Some(Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_)) => {
            let order = weights.word("actorder", &["group", "weight", "dynamic", "static"])?;
            order == "group" || order == "dynamic"
        }
    };
    let unsupported = |key: &str, value: String, because: &str| {
        Err(weights.unsupported(key, &Value::from(value), because.to_owned()))
    };
    let (scheme, formats): (_, &[&str]) = match (kind, bits, strategy, columns, blocks) {
        ("int", 4, "group", Some(_), _) | ("int", 4, "channel", None, _) => {
            let packing = Packing::CompressedTensors;
            (Scheme::Int4(Int4 { packing, group: columns, symmetric, act_order }), &["pack-quantized"])
        }
        ("int", 8, "channel", None, _) => (Scheme::Int8, &["int-quantized", "naive-quantized"]),
        ("float", 8, "tensor", None, _) => (Scheme::Fp8Tensor, &["float-quantized", "naive-quantized"]),
        ("float", 8, "channel", None, _) => (Scheme::Fp8Channel, &["float-quantized", "naive-quantized"]),
        ("float", 8, "block", _, Some(block)) => (Scheme::Fp8Block(block), &["float-quantized", "naive-quantized"]),
        ("float", 8, "group", Some(32), _) => {
            (Scheme::Mxfp8, &["mxfp8-quantized", "float-quantized", "naive-quantized"])
        }
        ("float", 4, "tensor_group" | "group", Some(16), _) => (Scheme::Nvfp4, &["nvfp4-pack-quantized"]),
        ("float", 4, "group", Some(32), _) => (Scheme::Mxfp4, &["mxfp4-pack-quantized"]),
        ("int", 4 | 8, _, _, _) | ("float", 4 | 8, _, _, _) => {
            let found = format!("{strategy}, group_size {columns:?}, block_structure {blocks:?}");
            return unsupported("strategy", found, &format!("no {kind}{bits} weights are scaled in this way"));
        }
        _ => return unsupported("num_bits", bits.to_string(), "only 4 and 8 bits are implemented"),
    };
    match scheme {
        Scheme::Int4(_) => {}
        Scheme::Fp8Block(_)
        | Scheme::Fp8Tensor
        | Scheme::Fp8Channel
        | Scheme::Mxfp8
        | Scheme::Int8
        | Scheme::Mxfp4
        | Scheme::Nvfp4 => {
            if !symmetric {
                return unsupported("symmetric", "false".into(), "zero points are implemented for int4 only");
            }
            if act_order {
                return unsupported("actorder", "group".into(), "an order of columns is implemented for int4 only");
            }
        }
    }
    match format {
        Some(format) if formats.contains(&format) => Ok(scheme),
        found => {
            let found = found.unwrap_or("no such key");
            Err(weights.contradiction("format", found, format!("{} for these weights", formats.join(" or "))))
        }
    }
}

fn gptq(config: &Config<'_>) -> Result<Scheme> {
    four_bits(config, &["bits"])?;
    let forms: &[&str] = &["gptq", "gptq_v2"];
    let [form, also] = [config.optional_word("checkpoint_format", forms)?, config.optional_word("format", forms)?];
    if let (Some(form), Some(also)) = (form, also)
        && form != also
    {
        return Err(config.contradiction("format", also, format!("checkpoint_format = {form} beside it")));
    }
    config.optional_word("pack_dtype", &["int32"])?;
    config.fixed("is_marlin_format", false)?;
    // GPTQModel: settings of single modules; those that begin with "-:" stay unquantised.
    let skips = |value: &&Value| match value {
        Value::Null => false,
        Value::Object(modules) => modules.keys().any(|module| !module.starts_with("-:")),
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => true,
    };
    if let Some(value) = config.get("dynamic").filter(skips) {
        return Err(config.unsupported("dynamic", value, "settings of single modules are not read"));
    }
    Ok(Scheme::Int4(Int4 {
        packing: Packing::Gptq { zeros_less_one: form.or(also) != Some("gptq_v2") },
        group: group(config, &["group_size"])?,
        symmetric: config.flag(&["sym"])?,
        act_order: config.flag(&["desc_act"])?,
    }))
}

fn awq(config: &Config<'_>) -> Result<Scheme> {
    four_bits(config, &["bits", "w_bit"])?;
    config.word("version", &["gemm", "GEMM"])?;
    Ok(Scheme::Int4(Int4 {
        packing: Packing::Awq,
        group: group(config, &["group_size", "q_group_size"])?,
        symmetric: !config.flag(&["zero_point"])?,
        act_order: false,
    }))
}
