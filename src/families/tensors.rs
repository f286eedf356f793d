//! The tensors of one matrix: codes, scales and what else goes with them, found by name and known by their dtypes.

use super::quantization::{Int4, Packing, Quantization, Scheme};
use super::reader::missing;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, Unsupported};
use crate::spec::{ScaleFormat, WeightFormat};
use crate::weights::{Dtype, Stored, Tensor};

/// Where the codes of a matrix may be. Names are those beside `MODULE.weight`; beside a name without a last
/// component of its own, such as `experts.gate_up_proj`, `weight` is that name.
const CODES: [&str; 4] = ["weight", "weight_packed", "qweight", "weight_blocks"];
const SCALES: &[&str] = &["weight_scale_inv", "weight_scale", "scale"];
/// What activations are quantised with: without a use where they are not.
const INPUT_SCALE: &str = "input_scale";
const INPUTS: [&str; 2] = ["input_global_scale", "input_zero_point"];

/// The tensors of one matrix, or of a stack of them.
#[derive(Debug, Clone)]
pub(super) struct Tensors<'a> {
    pub(super) codes: Tensor<'a>,
    pub(super) format: WeightFormat,
    beside: Beside<'a>,
    /// compressed-tensors' [out, in] of a packed matrix.
    pub(super) shape: Option<Tensor<'a>>,
    /// What a static scheme divides the matrix's input by.
    pub(super) input_scale: Option<Tensor<'a>>,
    inputs: Vec<Tensor<'a>>,
}

/// What goes with the codes.
#[derive(Debug, Clone)]
enum Beside<'a> {
    Nothing,
    /// The codes are blocks of GGUF, which have scales of their own.
    Blocks,
    Scales(Tensor<'a>),
    Nvfp4 {
        scales: Tensor<'a>,
        global: Tensor<'a>,
        divides: bool,
    },
    PackQuantized {
        scales: Tensor<'a>,
        zeros: Option<Tensor<'a>>,
        g_idx: Option<Tensor<'a>>,
    },
    Gptq {
        scales: Tensor<'a>,
        zeros: Tensor<'a>,
        zeros_less_one: bool,
        g_idx: Option<Tensor<'a>>,
    },
    Awq {
        scales: Tensor<'a>,
        zeros: Tensor<'a>,
    },
}

impl<'a> Tensors<'a> {
    /// The tensors in the checkpoint's arrangement. `act_order`: whether the matrix is to have an order of
    /// columns, as others of its MLP have.
    pub(super) fn stored(&self, act_order: bool) -> Stored<'_, 'a> {
        let codes = &self.codes;
        match &self.beside {
            Beside::Nothing => Stored::Plain(codes),
            Beside::Blocks => Stored::Gguf(codes),
            Beside::Scales(scales) => Stored::Scaled { codes, scales },
            Beside::Nvfp4 { scales, global, divides } => Stored::Nvfp4 { codes, scales, global, divides: *divides },
            Beside::PackQuantized { scales, zeros, g_idx } => {
                let g_idx = g_idx.as_ref().filter(|_| act_order);
                Stored::PackQuantized { codes, scales, zeros: zeros.as_ref(), g_idx }
            }
            Beside::Gptq { scales, zeros, zeros_less_one, g_idx } => {
                let g_idx = g_idx.as_ref().filter(|_| act_order);
                Stored::Gptq { codes, scales, zeros, zeros_less_one: *zeros_less_one, g_idx }
            }
            Beside::Awq { scales, zeros } => Stored::Awq { codes, scales, zeros },
        }
    }

    pub(super) fn is_plain(&self) -> bool {
        match self.beside {
            Beside::Nothing => true,
            Beside::Blocks
            | Beside::Scales(_)
            | Beside::Nvfp4 { scales: _, global: _, divides: _ }
            | Beside::PackQuantized { scales: _, zeros: _, g_idx: _ }
            | Beside::Gptq { scales: _, zeros: _, zeros_less_one: _, g_idx: _ }
            | Beside::Awq { scales: _, zeros: _ } => false,
        }
    }

    /// Whether there is a table of the columns' groups, trivial or not.
    pub(super) fn has_order(&self) -> bool {
        match &self.beside {
            Beside::PackQuantized { scales: _, zeros: _, g_idx }
            | Beside::Gptq { scales: _, zeros: _, zeros_less_one: _, g_idx } => g_idx.is_some(),
            Beside::Nothing
            | Beside::Blocks
            | Beside::Scales(_)
            | Beside::Nvfp4 { scales: _, global: _, divides: _ }
            | Beside::Awq { scales: _, zeros: _ } => false,
        }
    }

    /// All of them.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let Self { codes, format: _, beside, shape, input_scale, inputs } = self;
        let beside: [Option<&Tensor<'a>>; 3] = match beside {
            Beside::Nothing | Beside::Blocks => [None, None, None],
            Beside::Scales(scales) => [Some(scales), None, None],
            Beside::Nvfp4 { scales, global, divides: _ } => [Some(scales), Some(global), None],
            Beside::PackQuantized { scales, zeros, g_idx } => [Some(scales), zeros.as_ref(), g_idx.as_ref()],
            Beside::Gptq { scales, zeros, zeros_less_one: _, g_idx } => [Some(scales), Some(zeros), g_idx.as_ref()],
            Beside::Awq { scales, zeros } => [Some(scales), Some(zeros), None],
        };
        let all = std::iter::once(codes).chain(beside.into_iter().flatten()).chain(shape).chain(input_scale);
        all.chain(inputs).map(|tensor| tensor.name.as_ref())
    }
}

/// The name of a matrix's codes, if the checkpoint has them.
pub(super) fn codes_name(checkpoint: &Checkpoint, weight: &str) -> Option<String> {
    CODES.iter().map(|part| spelt(weight, part)).find(|name| checkpoint.tensor(name).is_some())
}

/// The names that a matrix's codes may have, for messages.
pub(super) fn expected_codes(weight: &str, quantization: Option<&Quantization>) -> String {
    let part = match quantization.map(|quantization| quantization.method) {
        Some("compressed-tensors") => Some("weight_packed"),
        Some("gptq" | "awq") => Some("qweight"),
        Some("mxfp4") => Some("weight_blocks"),
        Some(_) | None => None,
    };
    let names = std::iter::once("weight").chain(part).map(|part| spelt(weight, part));
    names.collect::<Vec<_>>().join(" or ")
}

/// `PART` beside `MODULE.weight`, or behind a name without such an end.
pub(super) fn spelt(weight: &str, part: &str) -> String {
    match (weight.strip_suffix(".weight"), part.strip_prefix("weight")) {
        (Some(module), _) => format!("{module}.{part}"),
        (None, Some(end)) => format!("{weight}{end}"),
        (None, None) => format!("{weight}_{part}"),
    }
}

/// Looks for the tensors of one matrix.
pub(super) struct Finder<'a, 'q> {
    pub(super) checkpoint: &'a Checkpoint,
    /// For messages.
    pub(super) family: &'static str,
    pub(super) quantization: Option<&'q Quantization>,
    /// The name that the matrix has unquantised.
    pub(super) weight: &'q str,
}

impl<'a> Finder<'a, '_> {
    pub(super) fn find(&self) -> Result<Tensors<'a>> {
        let found = CODES.iter().find_map(|part| Some((*part, self.optional(part)?)));
        let Some((part, codes)) = found else {
            return Err(missing(self.checkpoint, expected_codes(self.weight, self.quantization)));
        };
        let alone = match (part, codes.dtype) {
            ("weight", Dtype::F32) => Some((WeightFormat::F32, Beside::Nothing)),
            ("weight", Dtype::F16) => Some((WeightFormat::F16, Beside::Nothing)),
            ("weight", Dtype::BF16) => Some((WeightFormat::Bf16, Beside::Nothing)),
            _ => self.checkpoint.gguf_format(&codes.name)?.map(|format| (format, Beside::Blocks)),
        };
        if let Some((format, beside)) = alone {
            let (shape, input_scale, inputs) = (None, None, Vec::new());
            return Ok(Tensors { codes, format, beside, shape, input_scale, inputs });
        }
        let (format, beside) = match (part, codes.dtype) {
            _ if self.checkpoint.is_gguf() => {
                return Err(self.unsupported_dtype(&codes, "numbers of GGUF are F32, F16 or BF16"));
            }
            ("weight", Dtype::F8_E4M3) => self.fp8(&codes)?,
            ("weight", Dtype::I8 | Dtype::U8) | ("weight_packed", Dtype::U8) => self.bytes(&codes)?,
            ("weight_packed", Dtype::I32) => self.pack_quantized(&codes)?,
            ("qweight", Dtype::I32) => self.qweight(&codes)?,
            ("weight_blocks", Dtype::U8) => {
                self.schemes(&codes, |scheme| *scheme == Scheme::Mxfp4)?;
                (WeightFormat::Mxfp4, Beside::Scales(self.any(&["weight_scales"])?))
            }
            _ => {
                let because = "weights are F32, F16, BF16 or F8_E4M3, or 4-bit and INT8 codes with their scales";
                return Err(self.unsupported_dtype(&codes, because));
            }
        };
        let inputs = INPUTS.iter().filter_map(|part| self.optional(part)).collect();
        let (shape, input_scale) = (self.optional("weight_shape"), self.optional(INPUT_SCALE));
        Ok(Tensors { codes, format, beside, shape, input_scale, inputs })
    }

    fn optional(&self, part: &str) -> Option<Tensor<'a>> {
        self.checkpoint.tensor(&spelt(self.weight, part))
    }

    /// The first of several spellings.
    fn any(&self, parts: &[&str]) -> Result<Tensor<'a>> {
        let found = parts.iter().find_map(|part| self.optional(part));
        found.ok_or_else(|| {
            let mut names: Vec<String> = parts.iter().map(|part| spelt(self.weight, part)).collect();
            names.dedup();
            missing(self.checkpoint, names.join(" or "))
        })
    }

    fn unsupported_dtype(&self, tensor: &Tensor<'_>, because: &'static str) -> Error {
        Error::Unsupported(Unsupported {
            backend: format!("family {}", self.family).into(),
            field: format!("{}.dtype", tensor.name).into(),
            value: format!("{:?}", tensor.dtype),
            because: because.into(),
        })
    }

    /// The schemes of the config that codes may be stored in.
    fn schemes(&self, codes: &Tensor<'_>, kind: impl Fn(&Scheme) -> bool) -> Result<Vec<Scheme>> {
        let Some(Quantization { method, schemes, activations: _, scale_fmt: _, expert_dtype: _ }) = self.quantization
        else {
            return Err(Error::invalid(
                codes.name.to_string(),
                format!("{:?} weights and no quantization_config", codes.dtype),
                "a quantization_config that says how they are scaled",
                "add the model's quantization_config to config.json",
            ));
        };
        let found: Vec<Scheme> = schemes.iter().copied().filter(kind).collect();
        if found.is_empty() {
            return Err(Error::invalid(
                codes.name.to_string(),
                format!("{:?} weights", codes.dtype),
                format!("those of quantization_config.quant_method = {method}: {schemes:?}"),
                "correct quantization_config in config.json, or download the checkpoint again",
            ));
        }
        Ok(found)
    }

    /// The one of several schemes that the scales fit. A single one needs no choice: what does not fit it is
    /// refused where the matrix is read.
    fn choose<T: Copy + std::fmt::Debug>(scales: &Tensor<'_>, schemes: &[T], fits: impl Fn(T) -> bool) -> Result<T> {
        let fitting: Vec<T> = schemes.iter().copied().filter(|scheme| fits(*scheme)).collect();
        match (schemes, fitting.as_slice()) {
            ([one], _) | (_, [one]) => Ok(*one),
            _ => Err(Error::invalid(
                scales.name.to_string(),
                format!("shape {:?}, which {} of them have", scales.shape, fitting.len()),
                format!("scales of one of {schemes:?}"),
                "correct quantization_config in config.json, or download the checkpoint again",
            )),
        }
    }

    fn fp8(&self, codes: &Tensor<'a>) -> Result<(WeightFormat, Beside<'a>)> {
        let schemes = self.schemes(codes, |scheme| match scheme {
            Scheme::Fp8Block(_) | Scheme::Fp8Tensor | Scheme::Fp8Channel | Scheme::Mxfp8 => true,
            Scheme::Int8 | Scheme::Mxfp4 | Scheme::Nvfp4 | Scheme::Int4(_) => false,
        })?;
        let scales = self.any(SCALES)?;
        let (rows, cols, planes) = match codes.shape.as_slice() {
            [stack @ .., rows, cols] => (*rows, *cols, stack.iter().product::<usize>()),
            _ => (0, 0, 0),
        };
        let all: usize = scales.shape.iter().product();
        let tail = |expected: [usize; 2]| scales.shape.ends_with(&expected);
        let scheme = Self::choose(&scales, &schemes, |scheme| match scheme {
            Scheme::Fp8Block([block_rows, block_cols]) => tail([rows.div_ceil(block_rows), cols.div_ceil(block_cols)]),
            Scheme::Mxfp8 => tail([rows, cols.div_ceil(32)]) && exponents(&scales),
            Scheme::Fp8Tensor => all == planes,
            // The scale of a single row is the matrix's.
            Scheme::Fp8Channel => rows > 1 && all == planes.saturating_mul(rows),
            Scheme::Int8 | Scheme::Mxfp4 | Scheme::Nvfp4 | Scheme::Int4(_) => false,
        })?;
        let format = match scheme {
            Scheme::Fp8Block(block) => WeightFormat::Fp8Block { block, scale: self.scale_format(&scales)? },
            Scheme::Mxfp8 if exponents(&scales) => WeightFormat::Fp8Block { block: [1, 32], scale: ScaleFormat::E8m0 },
            Scheme::Mxfp8 => return Err(self.unsupported_dtype(&scales, "scales of MXFP8 are F8_E8M0 or U8")),
            Scheme::Fp8Tensor => WeightFormat::Fp8Tensor,
            Scheme::Fp8Channel | Scheme::Int8 | Scheme::Mxfp4 | Scheme::Nvfp4 | Scheme::Int4(_) => {
                WeightFormat::Fp8Channel
            }
        };
        Ok((format, Beside::Scales(scales)))
    }

    /// INT8 codes, or two FP4 codes to a byte: the scales say which.
    fn bytes(&self, codes: &Tensor<'a>) -> Result<(WeightFormat, Beside<'a>)> {
        self.schemes(codes, |scheme| match scheme {
            Scheme::Int8 | Scheme::Mxfp4 | Scheme::Nvfp4 => true,
            Scheme::Fp8Block(_) | Scheme::Fp8Tensor | Scheme::Fp8Channel | Scheme::Mxfp8 | Scheme::Int4(_) => false,
        })?;
        let scales = self.any(SCALES)?;
        let only = |meant: Scheme| self.schemes(codes, |scheme| *scheme == meant);
        match (codes.dtype, scales.dtype) {
            (_, Dtype::F8_E8M0 | Dtype::U8) => {
                only(Scheme::Mxfp4)?;
                Ok((WeightFormat::Mxfp4, Beside::Scales(scales)))
            }
            (Dtype::U8, Dtype::F8_E4M3) => {
                only(Scheme::Nvfp4)?;
                // compressed-tensors packs and divides, ModelOpt multiplies.
                let divides = self.optional("weight").is_none();
                let global = self.any(&[if divides { "weight_global_scale" } else { "weight_scale_2" }])?;
                Ok((WeightFormat::Nvfp4, Beside::Nvfp4 { scales, global, divides }))
            }
            (Dtype::I8, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                only(Scheme::Int8)?;
                Ok((WeightFormat::Int8Channel, Beside::Scales(scales)))
            }
            _ => Err(self.unsupported_dtype(&scales, "no scales of this type go with such codes")),
        }
    }

    fn int4_schemes(&self, codes: &Tensor<'a>, ours: impl Fn(Packing) -> bool) -> Result<Vec<Int4>> {
        let int4 = |scheme: &Scheme| match scheme {
            Scheme::Int4(int4) => Some(*int4).filter(|int4| ours(int4.packing)),
            Scheme::Fp8Block(_)
            | Scheme::Fp8Tensor
            | Scheme::Fp8Channel
            | Scheme::Mxfp8
            | Scheme::Int8
            | Scheme::Mxfp4
            | Scheme::Nvfp4 => None,
        };
        Ok(self.schemes(codes, |scheme| int4(scheme).is_some())?.iter().filter_map(int4).collect())
    }

    fn pack_quantized(&self, codes: &Tensor<'a>) -> Result<(WeightFormat, Beside<'a>)> {
        let schemes = self.int4_schemes(codes, |packing| packing == Packing::CompressedTensors)?;
        let scales = self.any(&["weight_scale"])?;
        let (zeros, g_idx) = (self.optional("weight_zero_point"), self.optional("weight_g_idx"));
        let groups = scales.shape.last().copied().unwrap_or(0);
        let cols = codes.shape.last().copied().unwrap_or(0).saturating_mul(8);
        let scheme = Self::choose(&scales, &schemes, |Int4 { packing: _, group, symmetric, act_order }| {
            let fits = group.map_or(1, |group| cols.div_ceil(group)) == groups;
            fits && symmetric == zeros.is_none() && act_order == g_idx.is_some()
        })?;
        self.require("weight_zero_point", !scheme.symmetric, zeros.as_ref())?;
        self.require("weight_g_idx", scheme.act_order, g_idx.as_ref())?;
        let format = self.int4(scheme, &scales, g_idx.as_ref())?;
        Ok((format, Beside::PackQuantized { scales, zeros, g_idx }))
    }

    fn qweight(&self, codes: &Tensor<'a>) -> Result<(WeightFormat, Beside<'a>)> {
        let schemes = self.int4_schemes(codes, |packing| packing != Packing::CompressedTensors)?;
        let (scales, zeros) = (self.any(&["scales"])?, self.any(&["qzeros"])?);
        let scheme = Self::choose(&scales, &schemes, |_| true)?;
        match scheme.packing {
            Packing::Gptq { zeros_less_one } => {
                let g_idx = self.optional("g_idx");
                self.require("g_idx", scheme.act_order, g_idx.as_ref())?;
                let format = self.int4(scheme, &scales, g_idx.as_ref())?;
                Ok((format, Beside::Gptq { scales, zeros, zeros_less_one, g_idx }))
            }
            Packing::Awq | Packing::CompressedTensors => {
                Ok((self.int4(scheme, &scales, None)?, Beside::Awq { scales, zeros }))
            }
        }
    }

    fn require(&self, part: &str, wanted: bool, found: Option<&Tensor<'a>>) -> Result<()> {
        match wanted && found.is_none() {
            true => Err(missing(self.checkpoint, spelt(self.weight, part))),
            false => Ok(()),
        }
    }

    fn int4(&self, scheme: Int4, scales: &Tensor<'_>, g_idx: Option<&Tensor<'_>>) -> Result<WeightFormat> {
        let Int4 { packing: _, group, symmetric, act_order } = scheme;
        let mut in_order = true;
        if let Some(g_idx) = g_idx {
            let groups = g_idx.to_i32(g_idx.shape.iter().product())?;
            in_order = groups.iter().enumerate().all(|(column, found)| {
                usize::try_from(*found).is_ok_and(|found| found == group.map_or(0, |group| column / group))
            });
            if !in_order && (!act_order || group.is_none()) {
                return Err(Error::invalid(
                    g_idx.name.to_string(),
                    "groups that are not runs of columns",
                    "runs of columns, as quantization_config says (desc_act or actorder, group_size)",
                    "correct quantization_config in config.json, or download the checkpoint again",
                ));
            }
        }
        let scale = self.scale_format(scales)?;
        Ok(WeightFormat::Int4 { group, scale, zero_points: !symmetric, act_order: !in_order })
    }

    fn scale_format(&self, scales: &Tensor<'_>) -> Result<ScaleFormat> {
        match scales.dtype {
            Dtype::F32 => Ok(ScaleFormat::F32),
            Dtype::F16 => Ok(ScaleFormat::F16),
            Dtype::BF16 => Ok(ScaleFormat::Bf16),
            Dtype::F8_E8M0 | Dtype::U8 => Ok(ScaleFormat::E8m0),
            _ => Err(self.unsupported_dtype(scales, "scales are F32, F16, BF16, F8_E8M0 or U8")),
        }
    }
}

/// Whether scales are exponent bytes.
fn exponents(scales: &Tensor<'_>) -> bool {
    scales.dtype == Dtype::F8_E8M0 || scales.dtype == Dtype::U8
}
