//! Takes matrices and vectors out of a checkpoint by name, whatever their layout, and remembers which.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::gguf;
use super::names::{Layout, Parts};
use super::quantization::Quantization;
use super::tensors::{Finder, Tensors, spelt};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, Unsupported};
use crate::spec::{ActivationQuant, ExpertMlp, GateUpLayout, Orientation, ScaleFormat, WeightFormat};
use crate::weights::{InputScales, Matrix, MlpWeights, Rows, Tensor};

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

impl Index {
    fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Of(count) => count,
        }
    }

    /// Where an MLP is in stacked tensors.
    fn stack(self, id: usize) -> Option<(usize, usize)> {
        match self {
            Self::One => None,
            Self::Of(count) => Some((id, count)),
        }
    }
}

impl Place {
    /// The matrix that shows the layout, and whose format is that of all.
    pub(super) fn probe(&self, index: Index) -> String {
        match self.layout {
            Layout::Each(parts) => self.each(index, 0, parts.gate.unwrap_or(parts.up), "weight"),
            Layout::Fused { gate_up, down: _, rows: _, orientation: _ } => format!("{}{gate_up}", self.path),
            Layout::Stacked(parts) | Layout::Flat(parts) => format!("{}{}", self.path, parts.up),
        }
    }

    /// All matrices.
    fn matrices(&self, index: Index) -> Vec<String> {
        let three = |Parts { gate, up, down }: &Parts| gate.iter().copied().chain([*up, *down]).collect::<Vec<_>>();
        match self.layout {
            Layout::Each(parts) => {
                let parts = three(parts);
                let ids = 0..index.count();
                ids.flat_map(|id| parts.iter().map(move |part| self.each(index, id, part, "weight"))).collect()
            }
            Layout::Fused { gate_up, down, rows: _, orientation: _ } => {
                [gate_up, down].iter().map(|part| format!("{}{part}", self.path)).collect()
            }
            Layout::Stacked(parts) | Layout::Flat(parts) => {
                three(parts).iter().map(|part| format!("{}{part}", self.path)).collect()
            }
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
        plain: bool,
    ) -> Result<(GateUpLayout, Orientation)> {
        match self.layout {
            // Quantised tensors are [out, in], also where plain ones are not (gpt-oss).
            Layout::Fused { gate_up: _, down: _, rows, orientation: _ } if !plain => Ok((*rows, Orientation::OutIn)),
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
pub(super) struct Reader<'a, 'q> {
    pub(super) checkpoint: &'a Checkpoint,
    /// For messages.
    family: &'static str,
    quantization: Option<&'q Quantization>,
    read: RefCell<BTreeSet<String>>,
}

/// One matrix among the tensors that hold it.
#[derive(Debug, Clone)]
struct View<'a> {
    tensors: Tensors<'a>,
    orientation: Orientation,
    part: Rows,
    stack: Option<(usize, usize)>,
}

/// The matrices of one MLP.
struct Views<'a> {
    gate: Option<View<'a>>,
    up: View<'a>,
    down: View<'a>,
}

impl<'a> Views<'a> {
    fn read(Parts { gate, up, down }: &Parts, view: impl Fn(&str) -> Result<View<'a>>) -> Result<Self> {
        Ok(Self { gate: gate.map(&view).transpose()?, up: view(up)?, down: view(down)? })
    }

    /// The same of another MLP in stacked tensors.
    fn entry(&self, stack: Option<(usize, usize)>) -> Self {
        let Self { gate, up, down } = self;
        let entry = |view: &View<'a>| View { stack, ..view.clone() };
        Self { gate: gate.as_ref().map(entry), up: entry(up), down: entry(down) }
    }
}

/// The biases of one MLP.
struct Biases {
    gate: Option<Vec<f32>>,
    up: Option<Vec<f32>>,
    down: Option<Vec<f32>>,
}

impl Biases {
    const NONE: Self = Self { gate: None, up: None, down: None };
}

impl<'a, 'q> Reader<'a, 'q> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        family: &'static str,
        quantization: Option<&'q Quantization>,
    ) -> Self {
        Self { checkpoint, family, quantization, read: RefCell::default() }
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

    /// The tensors of a matrix, by the name that it has unquantised.
    pub(super) fn tensors(&self, weight: &str) -> Result<Tensors<'a>> {
        let Self { checkpoint, family, quantization, read: _ } = *self;
        let tensors = Finder { checkpoint, family, quantization, weight }.find()?;
        self.read.borrow_mut().extend(tensors.names().map(str::to_owned));
        Ok(tensors)
    }

    /// The tensors that show how the MLPs of a place are stored, and their format: with an order of columns if
    /// one of the matrices has one.
    pub(super) fn probe(&self, place: &Place, index: Index) -> Result<(Tensors<'a>, WeightFormat)> {
        let tensors = self.tensors(&place.probe(index))?;
        let mut format = tensors.format;
        if tensors.has_order() && !act_order(format) {
            for name in place.matrices(index) {
                let other = self.tensors(&name)?.format;
                if act_order(other) {
                    format = other;
                    break;
                }
            }
        }
        Ok((tensors, format))
    }

    /// A matrix [out, in] that has tensors of its own.
    pub(super) fn plain(&self, weight: &str, format: WeightFormat, shape: [usize; 2]) -> Result<Matrix<'a>> {
        self.matrix(&self.own(weight)?, format, shape)
    }

    /// The row of a gate, which llama.cpp stores without a dimension for it.
    pub(super) fn row(&self, weight: &str, format: WeightFormat, len: usize) -> Result<Matrix<'a>> {
        let mut view = self.own(weight)?;
        let shape = &mut view.tensors.codes.shape;
        if self.checkpoint.is_gguf() && *shape == [len] {
            *shape = vec![1, len];
        }
        self.matrix(&view, format, [1, len])
    }

    fn own(&self, weight: &str) -> Result<View<'a>> {
        let tensors = self.tensors(weight)?;
        Ok(View { tensors, orientation: Orientation::OutIn, part: Rows::All, stack: None })
    }

    fn matrix(&self, view: &View<'a>, format: WeightFormat, shape: [usize; 2]) -> Result<Matrix<'a>> {
        let View { tensors, orientation, part, stack } = view;
        let both_plain = tensors.is_plain() && format.parts().blocks.is_none() && !format.parts().row_scale;
        // Another dtype of values or scales is named where they are read.
        let same = kind(tensors.format) == kind(format) && (act_order(format) || !act_order(tensors.format));
        if !both_plain && !same && self.checkpoint.is_gguf() {
            return Err(gguf::several_formats(&tensors.codes.name, tensors.format, format));
        }
        if !both_plain && !same {
            return Err(Error::invalid(
                tensors.codes.name.to_string(),
                format!("weights stored as {:?}", tensors.format),
                format!("{format:?} as the others of its kind"),
                "the experts of a layer have to share a format, and so have gate, up and down",
            ));
        }
        let [rows, cols] = shape;
        if let Some(stored) = &tensors.shape {
            let rows = match part {
                Rows::All => rows,
                Rows::Gate(layout) | Rows::Up(layout) => match layout {
                    GateUpLayout::Separate => rows,
                    GateUpLayout::Halves | GateUpLayout::Interleaved => 2 * rows,
                },
            };
            let expected = [rows, cols];
            let found = stored.to_i32(2)?;
            if !found.iter().zip(expected).all(|(found, size)| usize::try_from(*found) == Ok(size)) {
                let remedy = "check the tensor against config.json";
                return Err(Error::invalid(
                    stored.name.to_string(),
                    format!("{found:?}"),
                    format!("{expected:?}"),
                    remedy,
                ));
            }
        }
        Matrix::view(tensors.stored(act_order(format)), format, *orientation, *part, *stack, shape)
    }

    /// What a static scheme divides the input of a matrix by.
    fn input_scale(&self, View { tensors, orientation: _, part: _, stack }: &View<'a>) -> Result<(f32, String)> {
        let Some(tensor) = &tensors.input_scale else {
            return Err(missing(self.checkpoint, format!("{}: its input_scale", tensors.codes.name)));
        };
        let count: usize = tensor.shape.iter().product();
        let scales = tensor.to_finite_f32(count)?;
        let scale = match (scales.as_slice(), stack) {
            ([one], _) => Some(*one),
            (several, Some((id, count))) if several.len() == *count => several.get(*id).copied(),
            (_, _) => None,
        };
        match scale.filter(|scale| *scale > 0.0) {
            Some(scale) => Ok((scale, tensor.name.to_string())),
            None => Err(Error::invalid(
                tensor.name.to_string(),
                scale.map_or(format!("shape {:?}", tensor.shape), |scale| scale.to_string()),
                "one finite positive scale for an input",
                "the checkpoint is damaged: download or convert it again",
            )),
        }
    }

    /// Gate and up read the same codes, so that their scales have to agree.
    fn input_scales(&self, gate: Option<&View<'a>>, up: &View<'a>, down: &View<'a>) -> Result<InputScales> {
        let (gate_up, name) = self.input_scale(up)?;
        if let Some(gate) = gate {
            let (other, other_name) = self.input_scale(gate)?;
            if other != gate_up {
                return Err(Error::invalid(
                    other_name,
                    other,
                    format!("{gate_up}, as {name} says"),
                    "one scale for what gate and up both read; leave activations unquantised (--activations none)",
                ));
            }
        }
        Ok(InputScales { gate_up, down: self.input_scale(down)?.0 })
    }

    /// One MLP.
    fn mlp(
        &self,
        mlp: &ExpertMlp,
        width: usize,
        Views { gate, up, down }: Views<'a>,
        biases: Biases,
    ) -> Result<MlpWeights<'a>> {
        let inner = mlp.intermediate_size;
        let input_scales = match mlp.activation_quant {
            ActivationQuant::None | ActivationQuant::Dynamic { code: _, span: _, rule: _, scale: _ } => None,
            ActivationQuant::Static { code: _ } => Some(self.input_scales(gate.as_ref(), &up, &down)?),
        };
        Ok(MlpWeights {
            gate: gate.map(|gate| self.matrix(&gate, mlp.format, [inner, width])).transpose()?,
            up: self.matrix(&up, mlp.format, [inner, width])?,
            down: self.matrix(&down, mlp.format, [width, inner])?,
            gate_bias: biases.gate,
            up_bias: biases.up,
            down_bias: biases.down,
            input_scales,
        })
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
        let ids = 0..index.count();
        match place.layout {
            Layout::Each(parts) => ids.map(|id| self.each(place, parts, mlp, width, index, id)).collect(),
            Layout::Fused { gate_up, down, rows: _, orientation: _ } => {
                self.fused(place, [gate_up, down], mlp, width, index, outputs)
            }
            Layout::Stacked(parts) => self.stacked(place, parts, mlp, width, index),
            Layout::Flat(parts) => self.flat(place, parts, mlp, width, index.count()),
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
        let views = Views::read(parts, |part| self.own(&place.each(index, id, part, "weight")))?;
        let bias = |part: &str, wanted: bool, len: usize| {
            wanted.then(|| self.vector(&place.each(index, id, part, "bias"), len)).transpose()
        };
        let biases = Biases {
            gate: parts.gate.map_or(Ok(None), |gate| bias(gate, mlp.gate_up_bias, inner))?,
            up: bias(parts.up, mlp.gate_up_bias, inner)?,
            down: bias(parts.down, mlp.down_bias, width)?,
        };
        self.mlp(mlp, width, views, biases)
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
        let (inner, rows, orientation) = (mlp.intermediate_size, mlp.gate_up_layout, mlp.orientation);
        let count = index.count();
        let [gate_up, down] = [gate_up, down].map(|part| format!("{}{part}", place.path));
        let (both, last) = (self.tensors(&gate_up)?, self.tensors(&down)?);
        let planes = if both.codes.shape.first() == Some(&outputs) { outputs } else { count };
        let gate_up_bias = self.biases(&gate_up, mlp.gate_up_bias, [count, 2 * inner])?;
        let down_bias = self.biases(&down, mlp.down_bias, [count, width])?;
        let of = |planes: usize| match index {
            Index::One => Index::One,
            Index::Of(_) => Index::Of(planes),
        };
        let view = |tensors: &Tensors<'a>, part, stack| View { tensors: tensors.clone(), orientation, part, stack };
        let read = |id: usize| {
            let (gate, up) = entry(&gate_up_bias, id, 2 * inner).map(|both| split(&both, rows)).unzip();
            let views = Views {
                gate: Some(view(&both, Rows::Gate(rows), of(planes).stack(id))),
                up: view(&both, Rows::Up(rows), of(planes).stack(id)),
                down: view(&last, Rows::All, of(count).stack(id)),
            };
            self.mlp(mlp, width, views, Biases { gate, up, down: entry(&down_bias, id, width) })
        };
        (0..count).map(read).collect()
    }

    fn stacked(
        &self,
        place: &Place,
        parts: &Parts,
        mlp: &ExpertMlp,
        width: usize,
        index: Index,
    ) -> Result<Vec<MlpWeights<'a>>> {
        let (inner, count) = (mlp.intermediate_size, index.count());
        let name = |part: &str| format!("{}{part}", place.path);
        let views = Views::read(parts, |part| self.own(&name(part)))?;
        let biases = |part: &str, wanted: bool, len: usize| self.biases(&name(part), wanted, [count, len]);
        let gate = parts.gate.map_or(Ok(None), |gate| biases(gate, mlp.gate_up_bias, inner))?;
        let up = biases(parts.up, mlp.gate_up_bias, inner)?;
        let down = biases(parts.down, mlp.down_bias, width)?;
        let read = |id: usize| {
            let biases =
                Biases { gate: entry(&gate, id, inner), up: entry(&up, id, inner), down: entry(&down, id, width) };
            self.mlp(mlp, width, views.entry(index.stack(id)), biases)
        };
        (0..count).map(read).collect()
    }

    /// The biases of a matrix of all experts, [E, len].
    fn biases(&self, weight: &str, wanted: bool, [count, len]: [usize; 2]) -> Result<Option<Vec<f32>>> {
        if !wanted {
            return Ok(None);
        }
        let tensor = self.tensor(&spelt(weight, "bias"))?;
        expect_shape(&tensor, &[count, len])?;
        tensor.to_finite_f32(count * len).map(Some)
    }

    fn flat(
        &self,
        place: &Place,
        Parts { gate, up, down }: &Parts,
        mlp: &ExpertMlp,
        width: usize,
        count: usize,
    ) -> Result<Vec<MlpWeights<'a>>> {
        let inner = mlp.intermediate_size;
        // [E I, H] in the same bytes as [E, I, H].
        let view = |part: &str, orientation: Orientation| -> Result<View<'a>> {
            let mut tensors = self.tensors(&format!("{}{part}", place.path))?;
            expect_shape(&tensors.codes, &[count.saturating_mul(inner), width])?;
            tensors.codes.shape = vec![count, inner, width];
            Ok(View { tensors, orientation, part: Rows::All, stack: None })
        };
        let views = Views {
            gate: gate.map(|gate| view(gate, Orientation::OutIn)).transpose()?,
            up: view(up, Orientation::OutIn)?,
            down: view(down, Orientation::InOut)?,
        };
        let read = |id: usize| self.mlp(mlp, width, views.entry(Some((id, count))), Biases::NONE);
        (0..count).map(read).collect()
    }

    /// Refuses a tensor of the layer that nothing read: leaving it out would change the layer.
    pub(super) fn all_read(&self, owned: &[String]) -> Result<()> {
        let read = self.read.borrow();
        let ours = |name: &&str| owned.iter().any(|prefix| name.starts_with(prefix.as_str()));
        let surplus = self.checkpoint.names().filter(ours).find(|name| !read.contains(*name));
        let Some(tensor) = surplus.and_then(|name| self.checkpoint.tensor(name)) else { return Ok(()) };
        Err(Error::Unsupported(Unsupported {
            backend: format!("family {}", self.family).into(),
            field: tensor.name.to_string().into(),
            value: format!("{:?} {:?}", tensor.dtype, tensor.shape),
            because: "neither config.json nor the family has a use for this tensor of the layer".into(),
        }))
    }
}

/// One expert's of the biases of all.
fn entry(all: &Option<Vec<f32>>, id: usize, len: usize) -> Option<Vec<f32>> {
    all.as_ref().and_then(|all| all.chunks_exact(len).nth(id)).map(<[f32]>::to_vec)
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

/// The format of tensors but for the type of their scales and the order of their columns.
fn kind(format: WeightFormat) -> WeightFormat {
    match format {
        WeightFormat::Fp8Block { block, scale: _ } => WeightFormat::Fp8Block { block, scale: ScaleFormat::F32 },
        WeightFormat::Int4 { group, scale: _, zero_points, act_order: _ } => {
            WeightFormat::Int4 { group, scale: ScaleFormat::F32, zero_points, act_order: false }
        }
        WeightFormat::F32
        | WeightFormat::F16
        | WeightFormat::Bf16
        | WeightFormat::Fp8Tensor
        | WeightFormat::Fp8Channel
        | WeightFormat::Int8Channel
        | WeightFormat::Mxfp4
        | WeightFormat::Nvfp4
        | WeightFormat::Q8_0
        | WeightFormat::Q4K
        | WeightFormat::Q6K => format,
    }
}

/// Whether a table says which block a column belongs to.
fn act_order(format: WeightFormat) -> bool {
    format.parts().blocks.is_some_and(|blocks| blocks.act_order)
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
