//! How numbers are stored: weights with their scales, and what activations become before a GEMM.

use super::validate::{positive, width};
use crate::error::{Error, Result};

/// Type of the stored weights. How a checkpoint arranges the codes (`GPTQ`, `AWQ`, GGUF, ...) is a matter of
/// [`Stored`](crate::weights::Stored); this is what they mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightFormat {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// E4M3FN codes, `w[n, k] = code * scale[n / block[0], k / block[1]]`; partial edge blocks are legal.
    /// MXFP8 has blocks of [1, 32] and the scale E8m0.
    Fp8Block {
        /// [rows, columns] of a block.
        block: [usize; 2],
        /// Type of the stored scale.
        scale: ScaleFormat,
    },
    /// E4M3FN codes and one scale a matrix.
    Fp8Tensor,
    /// E4M3FN codes and one scale a row.
    Fp8Channel,
    /// INT8 codes and one scale a row.
    Int8Channel,
    /// E2M1 codes, 32 columns share a power of two: `w = code * 2^(b - 127)` (gpt-oss, DeepSeek-V4's experts).
    Mxfp4,
    /// E2M1 codes, 16 columns share an E4M3 scale, a matrix an f32 one: `w = code * scale * global`. Gate and
    /// up have a global scale each.
    Nvfp4,
    /// Four bits: `w = (code - zero) * scale`.
    Int4 {
        /// Columns that share scale and zero; `None` for whole rows.
        group: Option<usize>,
        /// Type of the stored scale.
        scale: ScaleFormat,
        /// Whether zeros are stored; else each is 8.
        zero_points: bool,
        /// Whether a column's group is `g_idx[column]`; else `column / group`.
        act_order: bool,
    },
    /// GGUF: INT8 codes, 32 columns share an f16 scale.
    Q8_0,
    /// GGUF: four bits, `w = d * sc * code - dmin * m`, sc and m of 32 columns, d and dmin of 256.
    Q4K,
    /// GGUF: six bits, `w = d * sc * (code - 32)`, sc of 16 columns, d of 256.
    Q6K,
}

/// Type of a stored scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleFormat {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Exponent byte b: 2^(b - 127), 255 = NaN.
    E8m0,
}

/// What is done to the rows that enter an expert GEMM.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ActivationQuant {
    /// Nothing: weight-only quantisation.
    None,
    /// Codes with scales found at run time.
    Dynamic {
        /// Type of a code.
        code: ActivationCode,
        /// What shares a scale.
        span: ScaleSpan,
        /// How a scale and the codes follow from the largest magnitude.
        rule: ScaleRule,
        /// Type of a scale.
        scale: ActivationScale,
    },
    /// Codes `x / input_scale`; each expert has a scale for its first GEMM and one for its second.
    Static {
        /// Type of a code.
        code: ActivationCode,
    },
}

/// Type of an activation's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationCode {
    /// E4M3FN: nearest even, beyond 448 saturated, NaN kept.
    E4m3,
    /// INT8: nearest even, saturated to -128 and 127. Has no NaN: the scale carries it.
    Int8,
}

impl ActivationCode {
    /// Largest value: what the largest magnitude of a span becomes.
    pub fn max(self) -> f32 {
        match self {
            Self::E4m3 => 448.0,
            Self::Int8 => 127.0,
        }
    }
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleSpan {
    /// So many columns of a row; the last group may be shorter.
    Group(usize),
    /// A row.
    Token,
    /// All rows that enter the GEMM of one call.
    Tensor,
}

/// From the largest magnitude `amax` of a span to its scale s and the codes of its values x. MAX is the code's
/// largest value. All operations are f32, each rounded to nearest even.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ScaleRule {
    /// `s = max(amax, 1e-10) / MAX`, code `x / s` (SGLang; vLLM's Triton kernels).
    FlooredAmax,
    /// `s = max(amax, 1e-10) * (1 / MAX)`, code `x / s`.
    FlooredAmaxTimesReciprocal,
    /// `s = max(min(amax / MAX, upper), floor)`, code `x / s` (vLLM's native and fused kernels). The floor is
    /// `1 / (MAX * 512)` for E4M3, 2^-23 for INT8.
    FlooredScale {
        /// `scale_ub`, if there is one.
        upper: Option<f32>,
    },
    /// `s = max(amax, 1e-4) / MAX`, code `x * (1 / s)` (DeepSeek).
    ReciprocalScale,
    /// `s = max(amax, 1e-4) / MAX`, code `x * (MAX / max(amax, 1e-4))` (DeepGEMM).
    ReciprocalAmax,
}

/// Type of a scale of dynamic activation quantisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationScale {
    /// The rule's s as it is.
    F32,
    /// s rounded up to a power of two, stored as f32.
    F32CeilPow2,
    /// The same value stored as exponent bytes, four to a word.
    Ue8m0Packed,
}

impl WeightFormat {
    pub(crate) fn validate(&self, path: &'static str) -> Result<()> {
        match self {
            Self::F32
            | Self::F16
            | Self::Bf16
            | Self::Fp8Tensor
            | Self::Fp8Channel
            | Self::Int8Channel
            | Self::Mxfp4
            | Self::Nvfp4
            | Self::Q8_0
            | Self::Q4K
            | Self::Q6K => Ok(()),
            Self::Fp8Block {
                block: [rows, columns],
                scale: ScaleFormat::F32 | ScaleFormat::F16 | ScaleFormat::Bf16 | ScaleFormat::E8m0,
            } => {
                if width(path, *rows).is_err() || width(path, *columns).is_err() {
                    return Err(Error::invalid(
                        path,
                        format!("blocks of {rows} x {columns}"),
                        format!("blocks of 1 to {} rows and columns", super::MAX_WIDTH),
                        "correct weight_block_size",
                    ));
                }
                Ok(())
            }
            Self::Int4 { group, scale, zero_points, act_order } => {
                group.map_or(Ok(()), |group| width(path, group))?;
                match (zero_points, scale) {
                    (_, ScaleFormat::F16 | ScaleFormat::Bf16) | (false, ScaleFormat::F32) => {}
                    (true, ScaleFormat::F32) | (_, ScaleFormat::E8m0) => {
                        return Err(Error::invalid(
                            path,
                            format!("{self:?}"),
                            "scales of F16 or Bf16, or of F32 without zero points",
                            "correct the scale's type",
                        ));
                    }
                }
                if *act_order && group.is_none() {
                    let remedy = "one group needs no order";
                    return Err(Error::invalid(path, format!("{self:?}"), "groups beside act_order", remedy));
                }
                Ok(())
            }
        }
    }
}

impl ActivationQuant {
    /// E4M3 codes of groups of columns as DeepSeek-V3's engines quantise them: rule [`ScaleRule::FlooredAmax`].
    pub const fn dynamic_fp8(group: usize, scale: ActivationScale) -> Self {
        Self::Dynamic { code: ActivationCode::E4m3, span: ScaleSpan::Group(group), rule: ScaleRule::FlooredAmax, scale }
    }

    /// Whether anything is quantised.
    pub fn is_on(&self) -> bool {
        match self {
            Self::None => false,
            Self::Dynamic { code: _, span: _, rule: _, scale: _ } | Self::Static { code: _ } => true,
        }
    }

    /// Whether all rows of a call share a scale: then a row's result depends on the others.
    pub fn shares_scale(&self) -> bool {
        match self {
            Self::Dynamic { code: _, span: ScaleSpan::Tensor, rule: _, scale: _ } => true,
            Self::None
            | Self::Static { code: _ }
            | Self::Dynamic { code: _, span: ScaleSpan::Group(_) | ScaleSpan::Token, rule: _, scale: _ } => false,
        }
    }

    pub(crate) fn validate(&self, path: &'static str, format: WeightFormat) -> Result<()> {
        match *self {
            Self::None => return Ok(()),
            Self::Static { code: ActivationCode::E4m3 | ActivationCode::Int8 } => {}
            Self::Dynamic { code: ActivationCode::E4m3 | ActivationCode::Int8, span, rule, scale } => {
                match span {
                    ScaleSpan::Group(group) => width(path, group)?,
                    ScaleSpan::Token | ScaleSpan::Tensor => {}
                }
                let power_of_two = match scale {
                    ActivationScale::F32 => false,
                    ActivationScale::F32CeilPow2 | ActivationScale::Ue8m0Packed => true,
                };
                match rule {
                    // MAX / amax is no power of two.
                    ScaleRule::ReciprocalAmax if power_of_two => {
                        let remedy = "the codes would not be those of the scale";
                        let found = "ReciprocalAmax with scales of powers of two";
                        return Err(Error::invalid(path, found, "another rule", remedy));
                    }
                    ScaleRule::FlooredScale { upper: Some(upper) } => positive("activation_quant.rule.upper", upper)?,
                    ScaleRule::FlooredAmax
                    | ScaleRule::FlooredAmaxTimesReciprocal
                    | ScaleRule::FlooredScale { upper: None }
                    | ScaleRule::ReciprocalScale
                    | ScaleRule::ReciprocalAmax => {}
                }
            }
        }
        match format {
            // Their minima and orders have no place in a sum over codes.
            WeightFormat::Q4K | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: true } => {
                let found = format!("{self:?} with weights of {format:?}");
                let remedy = "leave activations unquantised (ActivationQuant::None)";
                Err(Error::invalid(path, found, "weights whose groups are runs of columns without minima", remedy))
            }
            WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::Bf16
            | WeightFormat::Fp8Block { block: _, scale: _ }
            | WeightFormat::Fp8Tensor
            | WeightFormat::Fp8Channel
            | WeightFormat::Int8Channel
            | WeightFormat::Mxfp4
            | WeightFormat::Nvfp4
            | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: false }
            | WeightFormat::Q8_0
            | WeightFormat::Q6K => Ok(()),
        }
    }
}
