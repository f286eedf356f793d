//! Takes matrices and vectors out of a checkpoint by name, whatever their layout, and remembers which.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeSet;

use super::gguf;
use super::names::{Layout, Names, Parts};
use super::quantization::Quantization;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, Unsupported};
use crate::spec::{ExpertMlp, GateUpLayout, Orientation, ScaleFormat, WeightFormat};
use crate::weights::{Dtype, Matrix, MlpWeights, Rows, Stored, Tensor};

/// Last components of tensors that are no parameters: compressed-tensors' sizes of a packed matrix.
const NO_PARAMETERS: [&str; 1] = ["weight_shape"];

/// Where an MLP, or the routed experts, are.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// What the names of its tensors begin with.
    pub(super) path: String,
    pub(super) layout: &'static Layout,
}

/// How many MLPs a place holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Index {
    /// One, whose tensors have two dimensions.
    One,
    /// So many, each with a module of its own or stacked.
    Of(usize),
}

impl Place {
    /// The tensor that shows the layout, and whose dtype is that of all.
    pub(super) fn probe(&self, index: Index) -> String {
        match self.layout {
            Layout::Each(parts) => self.each(index, 0, parts.gate.unwrap_or(parts.up), "weight"),
            Layout::Fused { gate_up, down: _, rows: _, orientation: _ } => format!("{}{gate_up}", self.path),
            Layout::Stacked(parts) | Layout::Flat(parts) => format!("{}{}", self.path, parts.up),
        }
    }

    fn each(&self, index: Index, id: usize, part: &str, last: &str) -> String {
        match index {
            Index::One => format!("{}{part}.{last}", self.path),
            Index::Of(_) => format!("{}{id}.{part}.{last}", self.path),
        }
    }

    /// How the spec calls this layout. Where gate and up are one tensor its shape says whether it is transposed,
    /// and where that is square the other tensor's.
    pub(super) fn stored_as(
        &self,
        checkpoint: &Checkpoint,
        [inner, width]: [usize; 2],
        index: Index,
    ) -> Result<(GateUpLayout, Orientation)> {
        match self.layout {
            // DBRX's `down` is [in, out] beside [out, in]; the spec's word is that of gate and up.
            Layout::Each(_) | Layout::Stacked(_) | Layout::Flat(_) => Ok((GateUpLayout::Separate, Orientation::OutIn)),
            Layout::Fused { gate_up: _, down: _, rows, orientation: Some(orientation) } => Ok((*rows, *orientation)),
            Layout::Fused { gate_up, down, rows, orientation: None } => {
                let plane = |part: &str| -> Option<[usize; 2]> {
                    let shape = checkpoint.tensor(&format!("{}{part}", self.path))?.shape;
                    match (index, shape.as_slice()) {
                        (Index::One, [rows, cols]) | (Index::Of(_), [_, rows, cols]) => Some([*rows, *cols]),
                        (Index::One | Index::Of(_), _) => None,
                    }
                };
                let both = inner.saturating_mul(2);
                let transposed = match both == width {
                    false => plane(gate_up) == Some([width, both]),
                    true => plane(down) == Some([inner, width]),
                };
                Ok((*rows, if transposed { Orientation::InOut } else { Orientation::OutIn }))
            }
        }
    }
}

/// Takes tensors and remembers which.
pub(super) struct Reader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    names: &'static Names,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, names: &'static Names) -> Self {
        Self { checkpoint, names, read: RefCell::default() }
    }

    pub(super) fn tensor(&self, name: &str) -> Result<Tensor<'a>> {
        let tensor = self.checkpoint.tensor(name).ok_or_else(|| missing(self.checkpoint, name.to_owned()))?;
        self.read.borrow_mut().insert(name.to_owned());
        Ok(tensor)
    }

    /// A bias or a scale.
    pub(super) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.tensor(name)?.to_finite_f32(len)
    }

    /// A matrix [out, in] that has a tensor of its own.
    pub(super) fn plain(&self, name: &str, format: WeightFormat, shape: [usize; 2]) -> Result<Matrix<'a>> {
        let tensor = self.tensor(name)?;
        self.matrix(&tensor, name, format, Orientation::OutIn, Rows::All, None, shape)
    }

    #[allow(clippy::too_many_arguments, reason = "they are the arguments of Matrix::view, with the name of the scales")]
    pub(super) fn matrix(
        &self,
        weight: &Tensor<'a>,
        name: &str,
        format: WeightFormat,
        orientation: Orientation,
        part: Rows,
        stack: Option<(usize, usize)>,
        shape: [usize; 2],
    ) -> Result<Matrix<'a>> {
        if gguf::in_blocks(self.checkpoint, name, format)? {
            return Matrix::view(Stored::Gguf(weight), format, orientation, part, stack, shape);
        }
        let scale = match format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => None,
            WeightFormat::Fp8Block { block: _, scale: _ }
            | WeightFormat::Fp8Tensor
            | WeightFormat::Fp8Channel
            | WeightFormat::Int8Channel
            | WeightFormat::Mxfp4
            | WeightFormat::Nvfp4
            | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ }
            | WeightFormat::Q8_0
            | WeightFormat::Q4K
            | WeightFormat::Q6K => Some(self.tensor(&scale_name(self.checkpoint, self.names, name))?),
        };
        let stored = match &scale {
            None => Stored::Plain(weight),
            Some(scales) => Stored::Scaled { codes: weight, scales },
        };
        Matrix::view(stored, format, orientation, part, stack, shape)
    }

    /// The MLPs of a place, which work at `width`. `outputs` may be the number of gate and up matrices instead
    /// of the number of MLPs (LongCat's experts in memory, of which the zero experts are never read).
    pub(super) fn mlps(
        &self,
        place: &Place,
        mlp: &ExpertMlp,
        width: usize,
        index: Index,
        outputs: usize,
    ) -> Result<Vec<MlpWeights<'a>>> {
        let ids = 0..match index {
            Index::One => 1,
            Index::Of(count) => count,
        };
        match place.layout {
            Layout::Each(parts) => ids.map(|id| self.each(place, parts, mlp, width, index, id)).collect(),
            Layout::Fused { gate_up, down, rows: _, orientation: _ } => {
                self.fused(place, [gate_up, down], mlp, width, index, outputs)
            }
            Layout::Stacked(parts) => ids.map(|id| self.stacked(place, parts, mlp, width, index, id)).collect(),
            Layout::Flat(parts) => ids.map(|id| self.flat(place, parts, mlp, width, index, id)).collect(),
        }
    }

    fn each(
        &self,
        place: &Place,
        parts: &Parts,
        mlp: &ExpertMlp,
        width: usize,
        index: Index,
        id: usize,
    ) -> Result<MlpWeights<'a>> {
        let inner = mlp.intermediate_size;
        let matrix =
            |part: &str, shape: [usize; 2]| self.plain(&place.each(index, id, part, "weight"), mlp.format, shape);
        let bias = |part: &str, wanted: bool, len: usize| {
            wanted.then(|| self.vector(&place.each(index, id, part, "bias"), len)).transpose()
        };
        Ok(MlpWeights {
            gate: parts.gate.map(|gate| matrix(gate, [inner, width])).transpose()?,
            up: matrix(parts.up, [inner, width])?,
            down: matrix(parts.down, [width, inner])?,
            gate_bias: parts.gate.map_or(Ok(None), |gate| bias(gate, mlp.gate_up_bias, inner))?,
            up_bias: bias(parts.up, mlp.gate_up_bias, inner)?,
            down_bias: bias(parts.down, mlp.down_bias, width)?,
            input_scales: None,
        })
    }

    fn fused(
        &self,
        place: &Place,
        [gate_up, down]: [&str; 2],
        mlp: &ExpertMlp,
        width: usize,
        index: Index,
        outputs: usize,
    ) -> Result<Vec<MlpWeights<'a>>> {
        let ExpertMlp {
            intermediate_size: inner,
            activation: _,
            gate_up_layout: rows,
            orientation,
            gate_up_bias,
            down_bias,
            format,
            activation_quant: _,
        } = *mlp;
        let count = match index {
            Index::One => 1,
            Index::Of(count) => count,
        };
        let [gate_up, down] = [gate_up, down].map(|part| format!("{}{part}", place.path));
        let (both, last) = (self.tensor(&gate_up)?, self.tensor(&down)?);
        let planes = if both.shape.first() == Some(&outputs) { outputs } else { count };
        let stack = |id: usize, count: usize| match index {
            Index::One => None,
            Index::Of(_) => Some((id, count)),
        };
        let biases = |name: &str, wanted: bool, len: usize| -> Result<Option<Vec<f32>>> {
            if !wanted {
                return Ok(None);
            }
            let tensor = self.tensor(&gguf::bias_name(name))?;
            expect_shape(&tensor, &[count, len])?;
            tensor.to_finite_f32(count * len).map(Some)
        };
        let gate_up_bias = biases(&gate_up, gate_up_bias, 2 * inner)?;
        let down_bias = biases(&down, down_bias, width)?;
        let one = |all: &Option<Vec<f32>>, id: usize, len: usize| {
            all.as_ref().and_then(|all| all.chunks_exact(len).nth(id)).map(<[f32]>::to_vec)
        };
        (0..count)
            .map(|id| {
                let (gate_bias, up_bias) = one(&gate_up_bias, id, 2 * inner).map(|both| split(&both, rows)).unzip();
                let matrix = |tensor: &Tensor<'a>, name: &str, part: Rows, planes: usize, shape: [usize; 2]| {
                    self.matrix(tensor, name, format, orientation, part, stack(id, planes), shape)
                };
                Ok(MlpWeights {
                    gate: Some(matrix(&both, &gate_up, Rows::Gate(rows), planes, [inner, width])?),
                    up: matrix(&both, &gate_up, Rows::Up(rows), planes, [inner, width])?,
                    down: matrix(&last, &down, Rows::All, count, [width, inner])?,
                    gate_bias,
                    up_bias,
                    down_bias: one(&down_bias, id, width),
                    input_scales: None,
                })
            })
            .collect()
    }

    fn stacked(
        &self,
        place: &Place,
        parts: &Parts,
        mlp: &ExpertMlp,
        width: usize,
        index: Index,
        id: usize,
    ) -> Result<MlpWeights<'a>> {
        let inner = mlp.intermediate_size;
        let stack = match index {
            Index::One => None,
            Index::Of(count) => Some((id, count)),
        };
        let matrix = |part: &str, shape: [usize; 2]| {
            let name = format!("{}{part}", place.path);
            let tensor = self.tensor(&name)?;
            self.matrix(&tensor, &name, mlp.format, Orientation::OutIn, Rows::All, stack, shape)
        };
        let bias = |part: &str, wanted: bool, len: usize| {
            self.stacked_bias(&format!("{}{part}", place.path), wanted, stack, len)
        };
        Ok(MlpWeights {
            gate: parts.gate.map(|gate| matrix(gate, [inner, width])).transpose()?,
            up: matrix(parts.up, [inner, width])?,
            down: matrix(parts.down, [width, inner])?,
            gate_bias: parts.gate.map_or(Ok(None), |gate| bias(gate, mlp.gate_up_bias, inner))?,
            up_bias: bias(parts.up, mlp.gate_up_bias, inner)?,
            down_bias: bias(parts.down, mlp.down_bias, width)?,
            input_scales: None,
        })
    }

    fn flat(
        &self,
        place: &Place,
        parts: &Parts,
        mlp: &ExpertMlp,
        width: usize,
        index: Index,
        id: usize,
    ) -> Result<MlpWeights<'a>> {
        let inner = mlp.intermediate_size;
        let count = match index {
            Index::One => 1,
            Index::Of(count) => count,
        };
        // [E I, H] in the same bytes as [E, I, H].
        let matrix = |part: &str, orientation: Orientation, shape: [usize; 2]| {
            let name = format!("{}{part}", place.path);
            let flat = self.tensor(&name)?;
            expect_shape(&flat, &[count.saturating_mul(inner), width])?;
            let planes = Tensor { shape: vec![count, inner, width], name: Cow::clone(&flat.name), ..flat };
            self.matrix(&planes, &name, mlp.format, orientation, Rows::All, Some((id, count)), shape)
        };
        Ok(MlpWeights {
            gate: parts.gate.map(|gate| matrix(gate, Orientation::OutIn, [inner, width])).transpose()?,
            up: matrix(parts.up, Orientation::OutIn, [inner, width])?,
            down: matrix(parts.down, Orientation::InOut, [width, inner])?,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
            input_scales: None,
        })
    }

    /// Refuses a tensor of the layer that nothing read: leaving it out would change the layer.
    pub(super) fn all_read(&self, family: &str, owned: &[String]) -> Result<()> {
        let read = self.read.borrow();
        let parameter = |name: &str| name.rsplit('.').next().is_none_or(|last| !NO_PARAMETERS.contains(&last));
        let ours = |name: &&str| owned.iter().any(|prefix| name.starts_with(prefix.as_str())) && parameter(name);
        let surplus = self.checkpoint.names().filter(ours).find(|name| !read.contains(*name));
        let Some(tensor) = surplus.and_then(|name| self.checkpoint.tensor(name)) else { return Ok(()) };
        Err(Error::Unsupported(Unsupported {
            backend: format!("family {family}").into(),
            field: tensor.name.to_string().into(),
            value: format!("{:?} {:?}", tensor.dtype, tensor.shape),
            because: "neither config.json nor the family has a use for this tensor of the layer".into(),
        }))
    }
}

/// Gate and up biases of one expert, `[I]` each, from its `[2 I]`.
fn split(both: &[f32], layout: GateUpLayout) -> (Vec<f32>, Vec<f32>) {
    match layout {
        GateUpLayout::Separate | GateUpLayout::Halves => {
            let (gate, up) = both.split_at(both.len() / 2);
            (gate.to_vec(), up.to_vec())
        }
        GateUpLayout::Interleaved => {
            let part = |first: usize| both.iter().skip(first).step_by(2).copied().collect();
            (part(0), part(1))
        }
    }
}

/// The block scales of a matrix: `NAME.weight_scale_inv` beside `NAME.weight`, `NAME_scale_inv` beside `NAME`.
fn scale_name(checkpoint: &Checkpoint, names: &Names, weight: &str) -> String {
    let Some(stem) = weight.strip_suffix("weight") else { return format!("{weight}_scale_inv") };
    let full = |scale: &&str| format!("{stem}{scale}");
    let there = names.scales.iter().map(full).find(|name| checkpoint.tensor(name).is_some());
    there.or_else(|| names.scales.first().map(full)).unwrap_or_default()
}

/// The format of a stored matrix: its dtype, and that of its scales.
pub(super) fn format_of(
    checkpoint: &Checkpoint,
    family: &'static str,
    names: &Names,
    quantization: Option<&Quantization>,
    weight: &str,
) -> Result<WeightFormat> {
    let find = |name: &str| checkpoint.tensor(name).ok_or_else(|| missing(checkpoint, name.to_owned()));
    let unsupported = |tensor: &Tensor<'_>, because: &'static str| {
        Error::Unsupported(Unsupported {
            backend: format!("family {family}").into(),
            field: format!("{}.dtype", tensor.name).into(),
            value: format!("{:?}", tensor.dtype),
            because: because.into(),
        })
    };
    let tensor = find(weight)?;
    if let Some(format) = checkpoint.gguf_format(weight)? {
        return Ok(format);
    }
    match tensor.dtype {
        Dtype::F32 => Ok(WeightFormat::F32),
        Dtype::F16 => Ok(WeightFormat::F16),
        Dtype::BF16 => Ok(WeightFormat::Bf16),
        Dtype::F8_E4M3 => {
            let Some(quantization) = quantization else {
                return Err(Error::invalid(
                    weight.to_owned(),
                    "F8_E4M3 weights and no quantization_config",
                    "a quantization_config that says how they are scaled",
                    "add the model's quantization_config to config.json",
                ));
            };
            let scales = find(&scale_name(checkpoint, names, weight))?;
            let scale = match scales.dtype {
                Dtype::F32 => ScaleFormat::F32,
                Dtype::F8_E8M0 => ScaleFormat::E8m0,
                _ => return Err(unsupported(&scales, "block scales are F32 or F8_E8M0")),
            };
            Ok(WeightFormat::Fp8Block { block: quantization.block, scale })
        }
        _ => Err(unsupported(&tensor, "weights are F32, F16, BF16 or F8_E4M3")),
    }
}

pub(super) fn expect_shape(tensor: &Tensor<'_>, expected: &[usize]) -> Result<()> {
    if tensor.shape == expected {
        return Ok(());
    }
    Err(Error::invalid(
        tensor.name.to_string(),
        format!("shape {:?}", tensor.shape),
        format!("shape {expected:?}"),
        "check the tensor against config.json",
    ))
}

/// A tensor that is in none of the shards.
pub(super) fn missing(checkpoint: &Checkpoint, name: String) -> Error {
    Error::MissingTensor {
        name,
        searched: checkpoint.searched(),
        remedy: "download the shard that holds it, or ask for a layer that is here".into(),
    }
}
