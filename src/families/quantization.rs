//! `quantization_config`: what a checkpoint says about its quantised weights.

use serde_json::Value;

use super::config::{Config, TextConfig};
use super::irrelevant;
use crate::error::{Error, Result};

/// Block-FP8 weights, the only quantisation so far. The dtype of a tensor says whether it is quantised.
pub(super) struct Quantization {
    /// Rows and columns that share a weight scale.
    pub(super) block: [usize; 2],
    /// How the model's authors quantise activations.
    pub(super) activation_scheme: Option<&'static str>,
    /// The type that scales fit.
    pub(super) scale_fmt: Option<&'static str>,
}

impl Quantization {
    /// Reads the object, and the names of its keys that nobody knows.
    pub(super) fn read(family: &str, text: &TextConfig<'_>) -> Result<(Option<Self>, Vec<String>)> {
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
        // First, for the other keys mean nothing under another method.
        config.word("quant_method", &["fp8"])?;
        config.optional_word("fmt", &["e4m3"])?;
        config.optional_word("expert_dtype", &["fp8"])?;
        let quantization = Self {
            block: block(&config)?,
            activation_scheme: config.optional_word("activation_scheme", &["dynamic"])?,
            scale_fmt: config.optional_word("scale_fmt", &["ue8m0"])?,
        };
        Ok((Some(quantization), config.unknown(&[irrelevant::QUANTIZATION])))
    }
}

fn block(config: &Config<'_>) -> Result<[usize; 2]> {
    let key = "weight_block_size";
    let value = config.get(key).unwrap_or(&Value::Null);
    if *value == Value::from([128, 128].as_slice()) {
        return Ok([128, 128]);
    }
    // Absent and null both mean one scale a tensor.
    Err(config.unsupported(key, value, "only blocks of [128, 128] are implemented"))
}
