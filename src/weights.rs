//! Borrowed weights of one layer, checked against its spec. Changes no value.
//!
//! Half of this file are the checks: every size that a later index relies on is proved here.

use std::borrow::Cow;

pub use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::numerics;
use crate::spec::{
    ExpertMlp, GateUpLayout, MoeSpec, Orientation, Router, RoutingMethod, ScaleFormat, SharedExperts, SharedGate,
    WeightFormat,
};

/// A named array in its stored bytes (little-endian, row-major).
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor<'a> {
    /// Name in the checkpoint.
    pub name: Cow<'a, str>,
    /// Type of an element.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// All elements as f32, converted once. Accepts F32, F16 and BF16.
    ///
    /// # Errors
    /// Another dtype or a number of elements other than `len`.
    pub fn to_f32(&self, len: usize) -> Result<Vec<f32>> {
        let values: Vec<f32> = match self.dtype {
            Dtype::F32 => self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => self.halves().map(numerics::decode_f16).collect(),
            Dtype::BF16 => self.halves().map(numerics::decode_bf16).collect(),
            other => return Err(self.wrong_dtype(other, "F32, BF16 or F16")),
        };
        self.expect_len(values.len(), len)?;
        Ok(values)
    }

    /// All elements as i32. Accepts I32 and I64.
    ///
    /// # Errors
    /// Another dtype, another number of elements than `len`, or a value outside of i32.
    pub fn to_i32(&self, len: usize) -> Result<Vec<i32>> {
        let values: Vec<i32> = match self.dtype {
            Dtype::I32 => self.bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::I64 => self
                .bytes
                .chunks_exact(8)
                .map(|b| {
                    let value = i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
                    i32::try_from(value).map_err(|_| {
                        Error::invalid(self.name.to_string(), value, "values that fit 32 bits", "correct the tensor")
                    })
                })
                .collect::<Result<_>>()?,
            other => return Err(self.wrong_dtype(other, "I32 or I64")),
        };
        self.expect_len(values.len(), len)?;
        Ok(values)
    }

    fn halves(&self) -> impl Iterator<Item = u16> + 'a {
        self.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]))
    }

    fn wrong_dtype(&self, found: Dtype, expected: &str) -> Error {
        Error::invalid(
            format!("{}.dtype", self.name),
            format!("{found:?}"),
            expected,
            "convert the tensor or correct the spec",
        )
    }

    fn expect_len(&self, found: usize, expected: usize) -> Result<()> {
        if found != expected {
            return Err(Error::invalid(
                self.name.to_string(),
                format!("{found} elements (shape {:?})", self.shape),
                format!("{expected} elements"),
                "check the tensor against config.json",
            ));
        }
        Ok(())
    }
}

/// Which rows of a stored tensor a matrix takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// All of them.
    All,
    /// The gate rows of a fused gate and up tensor.
    Gate(GateUpLayout),
    /// Its up rows.
    Up(GateUpLayout),
}

/// One matrix [rows, cols] seen through strides in its stored bytes, so that stacked, transposed and
/// interleaved layouts cost no copy. Element (r, c) is read by [`Matrix::get`].
#[derive(Debug, Clone)]
pub struct Matrix<'a> {
    name: Cow<'a, str>,
    format: WeightFormat,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
    offset: usize,
    row_stride: usize,
    col_stride: usize,
    scales: Option<Scales<'a>>,
}

#[derive(Debug, Clone)]
struct Scales<'a> {
    bytes: &'a [u8],
    format: ScaleFormat,
    block: [usize; 2],
    offset: usize,
    cols: usize,
}

impl<'a> Matrix<'a> {
    /// The matrix [rows, cols] stored in `tensor`, or in entry `stack.0` of `stack.1` stacked ones.
    ///
    /// `scale` holds the block scales of an [`WeightFormat::Fp8Block`] tensor.
    ///
    /// # Errors
    /// A dtype or shape other than the format, layout and sizes imply, a missing or surplus scale.
    pub fn view(
        tensor: &Tensor<'a>,
        scale: Option<&Tensor<'a>>,
        format: WeightFormat,
        orientation: Orientation,
        part: Rows,
        stack: Option<(usize, usize)>,
        [rows, cols]: [usize; 2],
    ) -> Result<Self> {
        format.validate("format")?;
        let limit = crate::spec::MAX_WIDTH;
        let stacked = stack.is_none_or(|(entry, count)| entry < count && count <= limit);
        if rows > limit || cols > limit || !stacked {
            return Err(Error::invalid(
                tensor.name.to_string(),
                format!("a view of {rows} x {cols}, entry {stack:?}"),
                format!("at most {limit} rows, columns and entries, and an entry below their number"),
                "correct the sizes",
            ));
        }
        let (stored_dtype, element) = match format {
            WeightFormat::F32 => (Dtype::F32, 4),
            WeightFormat::F16 => (Dtype::F16, 2),
            WeightFormat::Bf16 => (Dtype::BF16, 2),
            WeightFormat::Fp8Block { block: _, scale: _ } => (Dtype::F8_E4M3, 1),
        };
        if tensor.dtype != stored_dtype {
            return Err(tensor.wrong_dtype(tensor.dtype, &format!("{stored_dtype:?}")));
        }
        // Rows of the stored tensor, first row of ours, and the distance between ours.
        let (stored_rows, first_row, row_step) = match part {
            Rows::All | Rows::Gate(GateUpLayout::Separate) | Rows::Up(GateUpLayout::Separate) => (rows, 0, 1),
            Rows::Gate(GateUpLayout::Halves) => (2 * rows, 0, 1),
            Rows::Up(GateUpLayout::Halves) => (2 * rows, rows, 1),
            Rows::Gate(GateUpLayout::Interleaved) => (2 * rows, 0, 2),
            Rows::Up(GateUpLayout::Interleaved) => (2 * rows, 1, 2),
        };
        let (plane, along_rows, along_cols) = match orientation {
            Orientation::OutIn => ([stored_rows, cols], cols, 1),
            Orientation::InOut => ([cols, stored_rows], 1, stored_rows),
        };
        let (entry, expected) = match stack {
            None => (0, plane.to_vec()),
            Some((entry, count)) => (entry, vec![count, plane[0], plane[1]]),
        };
        expect_shape(tensor, &expected, expected.iter().product::<usize>() * element)?;
        let scales = match (format, scale) {
            (WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16, None) => None,
            (WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16, Some(scale)) => {
                return Err(Error::invalid(
                    scale.name.to_string(),
                    "a block scale",
                    format!("none beside {:?} weights", tensor.dtype),
                    "remove the scale or correct the format",
                ));
            }
            (WeightFormat::Fp8Block { block: _, scale: _ }, None) => {
                return Err(Error::MissingTensor {
                    name: format!("{} (block scale)", tensor.name),
                    searched: "the layer's tensors".into(),
                    remedy: "FP8 weights need their scales; fetch the shard that holds them".into(),
                });
            }
            (WeightFormat::Fp8Block { block, scale: scale_format }, Some(scale)) => {
                if orientation != Orientation::OutIn || row_step != 1 || first_row % block[0] != 0 {
                    return Err(Error::invalid(
                        tensor.name.to_string(),
                        format!("FP8 blocks {block:?} in {orientation:?} with {part:?}"),
                        "[out, in] tensors whose parts begin at a block",
                        "store gate and up as tensors of their own",
                    ));
                }
                Some(Scales::new(scale, scale_format, block, plane, stack, first_row)?)
            }
        };
        Ok(Self {
            name: tensor.name.clone(),
            format,
            rows,
            cols,
            bytes: tensor.bytes,
            offset: entry * plane[0] * plane[1] + first_row * along_rows,
            row_stride: along_rows * row_step,
            col_stride: along_cols,
            scales,
        })
    }

    /// Name of the tensor.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Type of the stored weights.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// [rows, cols].
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The stored bits of element (row, col), in the low bits.
    pub fn code(&self, row: usize, col: usize) -> u32 {
        debug_assert!(row < self.rows && col < self.cols);
        let index = self.offset + row * self.row_stride + col * self.col_stride;
        let bytes = self.bytes;
        match self.format {
            WeightFormat::F32 => {
                let at = 4 * index;
                u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
            WeightFormat::F16 | WeightFormat::Bf16 => {
                u32::from(u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]))
            }
            WeightFormat::Fp8Block { block: _, scale: _ } => u32::from(bytes[index]),
        }
    }

    /// The scale of element (row, col); 1 where the format has none.
    pub fn scale(&self, row: usize, col: usize) -> f32 {
        self.scales.as_ref().map_or(1.0, |scales| scales.get(row, col))
    }

    /// The value of element (row, col): the exact code value, times its scale rounded to f32.
    pub fn get(&self, row: usize, col: usize) -> f32 {
        let code = self.code(row, col);
        match self.format {
            WeightFormat::F32 => f32::from_bits(code),
            WeightFormat::F16 => numerics::decode_f16(code as u16),
            WeightFormat::Bf16 => numerics::decode_bf16(code as u16),
            WeightFormat::Fp8Block { block: _, scale: _ } => numerics::decode_e4m3(code as u8) * self.scale(row, col),
        }
    }
}

impl<'a> Scales<'a> {
    fn new(
        tensor: &Tensor<'a>,
        format: ScaleFormat,
        block: [usize; 2],
        plane: [usize; 2],
        stack: Option<(usize, usize)>,
        first_row: usize,
    ) -> Result<Self> {
        let (dtype, element) = match format {
            ScaleFormat::F32 => (Dtype::F32, 4),
            ScaleFormat::E8m0 => (Dtype::F8_E8M0, 1),
        };
        if tensor.dtype != dtype {
            return Err(tensor.wrong_dtype(tensor.dtype, &format!("{dtype:?}")));
        }
        let blocks = [plane[0].div_ceil(block[0]), plane[1].div_ceil(block[1])];
        let (entry, expected) = match stack {
            None => (0, blocks.to_vec()),
            Some((entry, count)) => (entry, vec![count, blocks[0], blocks[1]]),
        };
        expect_shape(tensor, &expected, expected.iter().product::<usize>() * element)?;
        Ok(Self {
            bytes: tensor.bytes,
            format,
            block,
            offset: entry * blocks[0] * blocks[1] + first_row / block[0] * blocks[1],
            cols: blocks[1],
        })
    }

    fn get(&self, row: usize, col: usize) -> f32 {
        let index = self.offset + row / self.block[0] * self.cols + col / self.block[1];
        match self.format {
            ScaleFormat::F32 => {
                let at = 4 * index;
                let bytes = self.bytes;
                f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
            ScaleFormat::E8m0 => numerics::decode_e8m0(self.bytes[index]),
        }
    }
}

fn expect_shape(tensor: &Tensor<'_>, expected: &[usize], bytes: usize) -> Result<()> {
    if tensor.shape != expected || tensor.bytes.len() != bytes {
        return Err(Error::invalid(
            tensor.name.to_string(),
            format!("shape {:?} in {} bytes", tensor.shape, tensor.bytes.len()),
            format!("shape {expected:?} in {bytes} bytes"),
            "check the tensor against config.json",
        ));
    }
    Ok(())
}

/// Weights of the router.
#[derive(Debug, Clone)]
pub struct RouterWeights<'a> {
    /// [outputs, H]; `None` if the caller gives the logits.
    pub weight: Option<Matrix<'a>>,
    /// Bias inside the logits, `[outputs]`.
    pub bias: Option<Vec<f32>>,
    /// `e_score_correction_bias` `[outputs]`: for selection only, f32 whatever the checkpoint holds.
    pub selection_bias: Option<Vec<f32>>,
    /// Expert ids of each token id, [vocab_size, top_k].
    pub tid2eid: Option<Vec<i32>>,
}

/// Weights of one MLP.
#[derive(Debug, Clone)]
pub struct MlpWeights<'a> {
    /// [I, H]; `None` for an activation without gate.
    pub gate: Option<Matrix<'a>>,
    /// [I, H].
    pub up: Matrix<'a>,
    /// [H, I].
    pub down: Matrix<'a>,
    /// `[I]`.
    pub gate_bias: Option<Vec<f32>>,
    /// `[I]`.
    pub up_bias: Option<Vec<f32>>,
    /// `[H]`.
    pub down_bias: Option<Vec<f32>>,
}

/// Weights of one layer.
#[derive(Debug, Clone)]
pub struct MoeWeights<'a> {
    /// The router's.
    pub router: RouterWeights<'a>,
    /// One entry an expert, by id. Empty where only the routing is planned.
    pub experts: Vec<MlpWeights<'a>>,
    /// The shared expert's.
    pub shared: Option<MlpWeights<'a>>,
    /// [1, H], if the shared expert has a sigmoid gate.
    pub shared_gate: Option<Matrix<'a>>,
}

impl RouterWeights<'_> {
    /// Checks sizes, presence and ids against the spec.
    ///
    /// # Errors
    /// Names the tensor that is missing, surplus, misshapen or out of range.
    pub fn check(&self, spec: &MoeSpec) -> Result<()> {
        let Self { weight, bias, selection_bias, tid2eid } = self;
        let outputs = spec.router_outputs();
        let (has_weight, has_bias) = match spec.router {
            Router::Linear { input: _, format, bias, transform: _ } => {
                if let Some(weight) = weight {
                    expect_matrix("router.weight", weight, [outputs, spec.hidden_size], format)?;
                }
                (true, bias)
            }
            Router::Mlp { state_size: _, rms_norm_eps: _ } => (true, false),
            Router::Given { transform: _ } => (false, false),
        };
        present("router.weight", weight.is_some(), has_weight)?;
        vector("router.bias", bias.as_deref(), has_bias, outputs)?;
        vector("router.selection_bias", selection_bias.as_deref(), spec.has_selection_bias(), outputs)?;
        if let Some(expert) = selection_bias.iter().flatten().position(|bias| bias.is_nan()) {
            return Err(Error::invalid(
                "router.selection_bias",
                format!("NaN for expert {expert}"),
                "numbers",
                "the checkpoint is damaged: a NaN cannot be compared",
            ));
        }
        let vocab_size = match spec.routing.method {
            RoutingMethod::Hash { score: _, vocab_size } => Some(vocab_size),
            RoutingMethod::TopK { score: _, key: _, groups: _ } => None,
            RoutingMethod::TopKThenScore { score: _ } => None,
            RoutingMethod::JointNorm { num_shared: _, global_scale: _ } => None,
            RoutingMethod::Sparsemixer { router_jitter_noise: _ } => None,
        };
        present("router.tid2eid", tid2eid.is_some(), vocab_size.is_some())?;
        if let (Some(table), Some(vocab_size)) = (tid2eid, vocab_size) {
            let expected = vocab_size * spec.top_k;
            if table.len() != expected {
                return Err(Error::invalid(
                    "router.tid2eid",
                    format!("{} ids", table.len()),
                    format!("{expected} ([{vocab_size}, {}])", spec.top_k),
                    "check the table against vocab_size and num_experts_per_tok",
                ));
            }
            if let Some(id) = table.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= outputs)) {
                return Err(Error::invalid(
                    "router.tid2eid",
                    format!("expert id {id}"),
                    format!("ids in 0..{outputs}"),
                    "the table belongs to another model",
                ));
            }
        }
        Ok(())
    }
}

impl MlpWeights<'_> {
    fn check(&self, mlp: &ExpertMlp, hidden_size: usize, path: &str) -> Result<()> {
        let Self { gate, up, down, gate_bias, up_bias, down_bias } = self;
        let gated = mlp.activation.gated();
        let inner = mlp.intermediate_size;
        present("experts.gate", gate.is_some(), gated)?;
        if let Some(gate) = gate {
            expect_matrix(path, gate, [inner, hidden_size], mlp.format)?;
        }
        expect_matrix(path, up, [inner, hidden_size], mlp.format)?;
        expect_matrix(path, down, [hidden_size, inner], mlp.format)?;
        vector("experts.gate_bias", gate_bias.as_deref(), mlp.gate_up_bias && gated, inner)?;
        vector("experts.up_bias", up_bias.as_deref(), mlp.gate_up_bias, inner)?;
        vector("experts.down_bias", down_bias.as_deref(), mlp.down_bias, hidden_size)
    }
}

impl MoeWeights<'_> {
    /// Checks the whole layer against the spec.
    ///
    /// # Errors
    /// Names the tensor that is missing, surplus, misshapen or out of range.
    pub fn check(&self, spec: &MoeSpec) -> Result<()> {
        let Self { router, experts, shared, shared_gate } = self;
        router.check(spec)?;
        if experts.len() != spec.num_experts {
            return Err(Error::invalid(
                "experts",
                format!("weights of {}", experts.len()),
                format!("{} experts", spec.num_experts),
                "give the weights of each expert, by id",
            ));
        }
        for expert in experts {
            expert.check(&spec.experts, spec.hidden_size, "experts")?;
        }
        present("shared", shared.is_some(), spec.shared.is_some())?;
        let mut gated = false;
        if let Some(SharedExperts { mlp, gate, combination: _ }) = &spec.shared {
            if let Some(shared) = shared {
                shared.check(mlp, spec.hidden_size, "shared")?;
            }
            match gate {
                SharedGate::None => {}
                SharedGate::Sigmoid { format } => {
                    gated = true;
                    if let Some(row) = shared_gate {
                        expect_matrix("shared.gate", row, [1, spec.hidden_size], *format)?;
                    }
                }
            }
        }
        present("shared.gate", shared_gate.is_some(), gated)
    }
}

fn present(field: &'static str, found: bool, expected: bool) -> Result<()> {
    let word = |there| if there { "present" } else { "absent" };
    if found != expected {
        return Err(Error::invalid(field, word(found), word(expected), "make weights and spec agree"));
    }
    Ok(())
}

fn vector(field: &'static str, found: Option<&[f32]>, expected: bool, len: usize) -> Result<()> {
    present(field, found.is_some(), expected)?;
    match found {
        Some(values) if values.len() != len => Err(Error::invalid(
            field,
            format!("{} values", values.len()),
            format!("{len} values"),
            "check the tensor against the spec",
        )),
        Some(_) | None => Ok(()),
    }
}

fn expect_matrix(path: &str, matrix: &Matrix<'_>, shape: [usize; 2], format: WeightFormat) -> Result<()> {
    if matrix.shape() != shape || matrix.format() != format {
        return Err(Error::invalid(
            format!("{path} ({})", matrix.name()),
            format!("{:?} of {:?}", matrix.shape(), matrix.format()),
            format!("{shape:?} of {format:?}"),
            "make weights and spec agree",
        ));
    }
    Ok(())
}
