//! Borrowed weights of one layer, checked against its spec. Changes no value.
//!
//! Half of this file are the checks: every size that a later index relies on is proved here.

use std::borrow::Cow;

use rayon::prelude::*;
pub use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::numerics;
use crate::spec::{
    ExpertMlp, GateUpLayout, Latent, LatentNorm, MoeSpec, Orientation, Router, RouterInput, RoutingMethod, ScaleFormat,
    SharedExperts, SharedGate, WeightFormat,
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

    /// [`Tensor::to_f32`] of a bias or a scale, which has to be finite.
    ///
    /// # Errors
    /// Likewise; a value that is NaN or infinite.
    pub fn to_finite_f32(&self, len: usize) -> Result<Vec<f32>> {
        let values = self.to_f32(len)?;
        finite(&self.name, &values)?;
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
        let scales = Self {
            bytes: tensor.bytes,
            format,
            block,
            offset: entry * blocks[0] * blocks[1] + first_row / block[0] * blocks[1],
            cols: blocks[1],
        };
        let first = entry * blocks[0] * blocks[1];
        let values: Vec<f32> = (first..first + blocks[0] * blocks[1]).map(|index| scales.at(index)).collect();
        finite(&tensor.name, &values)?;
        Ok(scales)
    }

    fn get(&self, row: usize, col: usize) -> f32 {
        self.at(self.offset + row / self.block[0] * self.cols + col / self.block[1])
    }

    fn at(&self, index: usize) -> f32 {
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
    /// `e_score_correction_bias`, one for each selectable output: for selection only, f32 whatever the
    /// checkpoint holds.
    pub selection_bias: Option<Vec<f32>>,
    /// Expert ids of each token id, [vocab_size, top_k].
    pub tid2eid: Option<Vec<i32>>,
    /// `[H]`, what the router multiplies its normed input with ([`RouterInput::RmsNormScaled`]).
    pub input_scale: Option<Vec<f32>>,
    /// `[E]`, factors on the routing weights.
    pub per_expert_scale: Option<Vec<f32>>,
    /// Factor on all weights of [`RoutingMethod::JointNorm`].
    pub global_scale: Option<f32>,
    /// The layers of [`Router::Mlp`].
    pub mlp: Option<RouterMlpWeights<'a>>,
}

/// Weights of a [`Router::Mlp`]. S is its state's width.
#[derive(Debug, Clone)]
pub struct RouterMlpWeights<'a> {
    /// W_d [S, H].
    pub down: Matrix<'a>,
    /// b_d `[S]`.
    pub down_bias: Vec<f32>,
    /// `[S]`, on the state of the previous layer, if one enters.
    pub states_scale: Option<Vec<f32>>,
    /// `[S]`, behind the norm.
    pub norm: Vec<f32>,
    /// W_1 [S, S].
    pub fc1: Matrix<'a>,
    /// b_1 `[S]`.
    pub fc1_bias: Vec<f32>,
    /// W_2 [S, S].
    pub fc2: Matrix<'a>,
    /// b_2 `[S]`.
    pub fc2_bias: Vec<f32>,
    /// W_o [outputs, S].
    pub out: Matrix<'a>,
}

impl RouterWeights<'_> {
    /// A router without any weights: that of [`Router::Given`], and where to begin with the others.
    pub const NONE: Self = Self {
        weight: None,
        bias: None,
        selection_bias: None,
        tid2eid: None,
        input_scale: None,
        per_expert_scale: None,
        global_scale: None,
        mlp: None,
    };
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
    /// The shared experts': [`MoeSpec::shared_mlps`] of them.
    pub shared: Vec<MlpWeights<'a>>,
    /// [1, H], if the shared expert has a sigmoid gate.
    pub shared_gate: Option<Matrix<'a>>,
    /// Around the routed experts.
    pub latent: Option<LatentWeights<'a>>,
    /// `[H]`, on the routed sum.
    pub output_bias: Option<Vec<f32>>,
    /// `[H]`, behind the norm of the output.
    pub output_norm: Option<Vec<f32>>,
}

/// Weights of a [`Latent`]. L is its size.
#[derive(Debug, Clone)]
pub struct LatentWeights<'a> {
    /// [L, H].
    pub down: Matrix<'a>,
    /// [H, L].
    pub up: Matrix<'a>,
    /// `[L]`: what a norm multiplies with, 1 included where the model stores it less 1.
    pub norm: LatentNormWeights,
}

/// Weights of a [`LatentNorm`].
#[derive(Debug, Clone, PartialEq)]
pub enum LatentNormWeights {
    /// Of [`LatentNorm::None`].
    None,
    /// Of [`LatentNorm::Reduced`].
    Reduced(Vec<f32>),
    /// Of [`LatentNorm::PreAndPost`].
    PreAndPost {
        /// Behind the first norm.
        pre: Vec<f32>,
        /// Before the second norm.
        post: Vec<f32>,
    },
}

impl RouterWeights<'_> {
    /// Checks sizes, presence and ids against the spec.
    ///
    /// # Errors
    /// Names the tensor that is missing, surplus, misshapen or out of range.
    pub fn check(&self, spec: &MoeSpec) -> Result<()> {
        let Self { weight, bias, selection_bias, tid2eid, input_scale, per_expert_scale, global_scale, mlp } = self;
        let (outputs, selectable) = (spec.router_outputs(), spec.selectable());
        let (mut has_weight, mut has_bias, mut has_scale, mut has_mlp) = (false, false, false, false);
        match spec.router {
            Router::Linear { input, format, bias, transform: _ } => {
                if let Some(weight) = weight {
                    expect_matrix("router.weight", weight, [outputs, spec.hidden_size], format)?;
                }
                (has_weight, has_bias) = (true, bias);
                match input {
                    RouterInput::Hidden => {}
                    RouterInput::RmsNormScaled { eps: _ } => has_scale = true,
                }
            }
            Router::Mlp { state_size, rms_norm_eps: _, previous_state, format } => {
                has_mlp = true;
                if let Some(mlp) = mlp {
                    mlp.check([spec.hidden_size, state_size, outputs], previous_state, format)?;
                }
            }
            Router::Given { transform: _ } => {}
        }
        present("router.weight", weight.is_some(), has_weight)?;
        present("router.mlp", mlp.is_some(), has_mlp)?;
        vector("router.bias", bias.as_deref(), has_bias, outputs)?;
        vector("router.selection_bias", selection_bias.as_deref(), spec.has_selection_bias(), selectable)?;
        vector("router.input_scale", input_scale.as_deref(), has_scale, spec.hidden_size)?;
        let per_expert = spec.routing.per_expert_scale;
        vector("router.per_expert_scale", per_expert_scale.as_deref(), per_expert, spec.num_experts)?;
        let has_global_scale = match spec.routing.method {
            RoutingMethod::JointNorm { num_shared: _, global_scale } => global_scale,
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Hash { score: _, vocab_size: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => false,
        };
        vector("router.global_scale", global_scale.as_ref().map(std::slice::from_ref), has_global_scale, 1)?;
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
            if let Some(id) = table.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= selectable)) {
                return Err(Error::invalid(
                    "router.tid2eid",
                    format!("expert id {id}"),
                    format!("ids in 0..{selectable}"),
                    "the table belongs to another model",
                ));
            }
        }
        Ok(())
    }
}

impl RouterMlpWeights<'_> {
    fn check(
        &self,
        [hidden_size, state, outputs]: [usize; 3],
        previous_state: bool,
        format: WeightFormat,
    ) -> Result<()> {
        let Self { down, down_bias, states_scale, norm, fc1, fc1_bias, fc2, fc2_bias, out } = self;
        expect_matrix("router.mlp.down", down, [state, hidden_size], format)?;
        expect_matrix("router.mlp.fc1", fc1, [state, state], format)?;
        expect_matrix("router.mlp.fc2", fc2, [state, state], format)?;
        expect_matrix("router.mlp.out", out, [outputs, state], format)?;
        vector("router.mlp.down_bias", Some(down_bias), true, state)?;
        vector("router.mlp.states_scale", states_scale.as_deref(), previous_state, state)?;
        vector("router.mlp.norm", Some(norm), true, state)?;
        vector("router.mlp.fc1_bias", Some(fc1_bias), true, state)?;
        vector("router.mlp.fc2_bias", Some(fc2_bias), true, state)
    }
}

impl LatentWeights<'_> {
    fn check(&self, spec: &Latent, hidden_size: usize) -> Result<()> {
        let Self { down, up, norm } = self;
        let Latent { size, format, norm: spec_norm } = spec;
        expect_matrix("latent.down", down, [*size, hidden_size], *format)?;
        expect_matrix("latent.up", up, [hidden_size, *size], *format)?;
        let (reduced, pre, post) = match norm {
            LatentNormWeights::None => (None, None, None),
            LatentNormWeights::Reduced(weight) => (Some(weight.as_slice()), None, None),
            LatentNormWeights::PreAndPost { pre, post } => (None, Some(pre.as_slice()), Some(post.as_slice())),
        };
        let (has_reduced, has_both) = match spec_norm {
            LatentNorm::None => (false, false),
            LatentNorm::Reduced { eps: _ } => (true, false),
            LatentNorm::PreAndPost { pre_eps: _, post_eps: _ } => (false, true),
        };
        vector("latent.norm", reduced, has_reduced, *size)?;
        vector("latent.norm.pre", pre, has_both, *size)?;
        vector("latent.norm.post", post, has_both, *size)
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
        let Self { router, experts, shared, shared_gate, latent, output_bias, output_norm } = self;
        router.check(spec)?;
        let count = |field: &'static str, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => Err(Error::invalid(
                field,
                format!("weights of {found}"),
                format!("of {expected}"),
                "give the weights of each expert, by id",
            )),
        };
        count("experts", experts.len(), spec.num_experts)?;
        for expert in experts {
            expert.check(&spec.experts, spec.expert_width(), "experts")?;
        }
        count("shared", shared.len(), spec.shared_mlps())?;
        let mut gated = false;
        if let Some(SharedExperts { mlp, gate, combination: _ }) = &spec.shared {
            for shared in shared {
                shared.check(mlp, spec.hidden_size, "shared")?;
            }
            match gate {
                SharedGate::None | SharedGate::Joint => {}
                SharedGate::Sigmoid { format } => {
                    gated = true;
                    if let Some(row) = shared_gate {
                        expect_matrix("shared.gate", row, [1, spec.hidden_size], *format)?;
                    }
                }
            }
        }
        present("shared.gate", shared_gate.is_some(), gated)?;
        present("latent", latent.is_some(), spec.latent.is_some())?;
        if let (Some(weights), Some(latent)) = (latent, &spec.latent) {
            weights.check(latent, spec.hidden_size)?;
        }
        vector("output_bias", output_bias.as_deref(), spec.output_bias, spec.hidden_size)?;
        vector("output_norm", output_norm.as_deref(), spec.output_norm.is_some(), spec.hidden_size)
    }
}

/// Weights of one matrix that are NaN or infinite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Name of the tensor in the checkpoint.
    pub tensor: String,
    /// The matrix that reads it, e.g. `experts[3].up`.
    pub matrix: String,
    /// How many.
    pub count: usize,
    /// Row and column of the first, in the matrix.
    pub first: [usize; 2],
}

impl MoeWeights<'_> {
    /// Every matrix with the path of its field.
    pub fn matrices(&self) -> Vec<(String, &Matrix<'_>)> {
        let Self { router, experts, shared, shared_gate, latent, output_bias: _, output_norm: _ } = self;
        let mut all: Vec<(String, &Matrix<'_>)> = vec![];
        all.extend(router.weight.iter().map(|weight| ("router.weight".into(), weight)));
        if let Some(RouterMlpWeights {
            down,
            fc1,
            fc2,
            out,
            down_bias: _,
            states_scale: _,
            norm: _,
            fc1_bias: _,
            fc2_bias: _,
        }) = &router.mlp
        {
            let named = [("down", down), ("fc1", fc1), ("fc2", fc2), ("out", out)];
            all.extend(named.map(|(name, matrix)| (format!("router.mlp.{name}"), matrix)));
        }
        for (path, mlps) in [("experts", experts), ("shared", shared)] {
            for (index, MlpWeights { gate, up, down, gate_bias: _, up_bias: _, down_bias: _ }) in
                mlps.iter().enumerate()
            {
                all.extend(gate.iter().map(|gate| (format!("{path}[{index}].gate"), gate)));
                all.push((format!("{path}[{index}].up"), up));
                all.push((format!("{path}[{index}].down"), down));
            }
        }
        all.extend(shared_gate.iter().map(|gate| ("shared.gate".into(), gate)));
        if let Some(LatentWeights { down, up, norm: _ }) = latent {
            all.extend([("latent.down".into(), down), ("latent.up".into(), up)]);
        }
        all
    }

    /// Finds weights that are NaN or infinite: each matrix that has some. They are no error elsewhere, since
    /// they propagate as the arithmetic says; biases and scales are checked by [`MoeWeights::check`].
    pub fn scan(&self) -> Vec<Damage> {
        let damage = |(path, matrix): &(String, &Matrix<'_>)| {
            let [rows, cols] = matrix.shape();
            let bad = |(row, col): &(usize, usize)| !matrix.get(*row, *col).is_finite();
            let mut found = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).filter(bad);
            let (row, col) = found.next()?;
            let tensor = matrix.name().to_owned();
            Some(Damage { tensor, matrix: path.clone(), count: 1 + found.count(), first: [row, col] })
        };
        self.matrices().par_iter().filter_map(damage).collect()
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
    let Some(values) = found else { return Ok(()) };
    if values.len() != len {
        return Err(Error::invalid(
            field,
            format!("{} values", values.len()),
            format!("{len} values"),
            "check the tensor against the spec",
        ));
    }
    finite(field, values)
}

/// A bias or a scale that is NaN or infinite spoils what it touches: the checkpoint is damaged.
fn finite(field: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::invalid(
            field.to_owned(),
            format!("{} at {at}", values[at]),
            "finite numbers",
            "the checkpoint is damaged: download or convert it again",
        )),
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
