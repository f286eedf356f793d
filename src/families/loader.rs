//! From the names of tensors to the weights of a layer.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::names::{Names, Site, Stacked};
use super::quantization::Quantization;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, Unsupported};
use crate::spec::{
    ExpertMlp, GateUpLayout, MoeSpec, Orientation, Router, RoutingMethod, ScaleFormat, SharedExperts, SharedGate,
    WeightFormat,
};
use crate::weights::{Dtype, Matrix, MlpWeights, MoeWeights, RouterWeights, Rows, Tensor};

/// Where a layer's tensors are.
#[derive(Debug, Clone)]
pub(super) struct Source {
    /// For messages.
    family: &'static str,
    names: &'static Names,
    /// What all names of the layer begin with; every tensor that does has to be read.
    prefix: String,
    router: RouterNames,
    experts: Option<Storage>,
}

/// How the routed experts are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Storage {
    PerExpert([&'static str; 3]),
    Stacked,
}

#[derive(Debug, Clone)]
struct RouterNames {
    weight: String,
    scale: String,
    bias: Option<String>,
    selection_bias: Option<String>,
    tid2eid: Option<String>,
}

/// How the experts of a layer are stored, as far as the spec says it.
pub(super) struct Stored {
    pub(super) router: WeightFormat,
    pub(super) experts: WeightFormat,
    pub(super) shared: Option<WeightFormat>,
    pub(super) layout: GateUpLayout,
    pub(super) orientation: Orientation,
    pub(super) biases: bool,
}

impl Source {
    /// The whole layer at a site.
    pub(super) fn layer(checkpoint: &Checkpoint, family: &'static str, (prefix, names): &Site) -> Result<Self> {
        let stacked = format!("{prefix}experts.gate_up_proj");
        let storage = match names.projections {
            Some(projections) if checkpoint.tensor(&stacked).is_none() => {
                let first = format!("{prefix}experts.0.{}.weight", projections[0]);
                if checkpoint.tensor(&first).is_none() {
                    return Err(missing(checkpoint, format!("{first} or {stacked}")));
                }
                Storage::PerExpert(projections)
            }
            Some(_) | None => Storage::Stacked,
        };
        Ok(Self {
            family,
            names,
            prefix: prefix.clone(),
            router: RouterNames::at(prefix, names),
            experts: Some(storage),
        })
    }

    /// Only the router of a site.
    pub(super) fn router_of_layer(family: &'static str, (prefix, names): &Site) -> Self {
        let router = RouterNames::at(prefix, names);
        Self { family, names, prefix: format!("{prefix}{}.", names.router), router, experts: None }
    }

    /// A router that is alone in its checkpoint, its tensors named by their last component.
    pub(super) fn bare_router(
        checkpoint: &Checkpoint,
        family: &'static str,
        modules: &'static [Names],
    ) -> Result<Self> {
        let Some(names) = modules.first() else { return Err(missing(checkpoint, "weight".into())) };
        let find = |spellings: &mut dyn Iterator<Item = &'static str>| -> Result<Option<String>> {
            let spellings: BTreeSet<&str> = spellings.filter_map(|name| name.rsplit('.').next()).collect();
            let found: Vec<&str> = checkpoint
                .names()
                .filter(|name| name.rsplit('.').next().is_some_and(|last| spellings.contains(last)))
                .collect();
            match found.as_slice() {
                [] => Ok(None),
                [one] => Ok(Some((*one).to_owned())),
                [one, other, ..] => Err(Error::invalid(
                    (*one).to_owned(),
                    format!("{other} beside it"),
                    "one tensor of this name in a checkpoint of one router",
                    "give a checkpoint of one router, or of whole layers",
                )),
            }
        };
        let weight = find(&mut ["weight"].into_iter())?;
        let weight = weight.ok_or_else(|| missing(checkpoint, format!("{}.weight", names.router)))?;
        let optional = |found: Option<String>, wanted: Option<&str>| found.or(wanted.map(str::to_owned));
        let bias = || modules.iter().filter_map(|names| names.router_bias);
        let selection_bias = || modules.iter().filter_map(|names| names.selection_bias);
        let tid2eid = || modules.iter().filter_map(|names| names.tid2eid);
        let router = RouterNames {
            scale: format!("{}{}", weight.strip_suffix("weight").unwrap_or(""), names.scale),
            weight,
            bias: optional(find(&mut bias())?, bias().next()),
            selection_bias: optional(find(&mut selection_bias())?, selection_bias().next()),
            tid2eid: optional(find(&mut tid2eid())?, tid2eid().next()),
        };
        Ok(Self { family, names, prefix: String::new(), router, experts: None })
    }

    /// Whether no expert is to be read.
    pub(super) fn is_router_only(&self) -> bool {
        self.experts.is_none()
    }

    /// How the layer is stored: the dtypes of its tensors.
    pub(super) fn stored(
        &self,
        checkpoint: &Checkpoint,
        quantization: Option<&Quantization>,
        shared: bool,
    ) -> Result<Stored> {
        let format = |weight: &str, scale: &str| format_of(checkpoint, self.family, quantization, weight, scale);
        let prefix = &self.prefix;
        let scale = self.names.scale;
        let router = format(&self.router.weight, &self.router.scale)?;
        let shared = match (self.names.shared, self.names.projections) {
            (Some(module), Some([gate, _, _])) if shared && self.experts.is_some() => {
                Some(format(&format!("{prefix}{module}.{gate}.weight"), &format!("{prefix}{module}.{gate}.{scale}"))?)
            }
            // Without expert tensors the spec still needs a format; see `resolve_router`.
            (Some(_) | None, Some(_) | None) => shared.then_some(router),
        };
        let Stacked { layout, orientation, biases } = self.names.stacked;
        Ok(match self.experts {
            Some(Storage::PerExpert([gate, _, _])) => {
                let gate = format!("{prefix}experts.0.{gate}");
                let experts = format(&format!("{gate}.weight"), &format!("{gate}.{scale}"))?;
                let (layout, orientation) = (GateUpLayout::Separate, Orientation::OutIn);
                Stored { router, experts, shared, layout, orientation, biases: false }
            }
            Some(Storage::Stacked) => {
                let gate_up = format!("{prefix}experts.gate_up_proj");
                let experts = format(&gate_up, &format!("{gate_up}_scale_inv"))?;
                Stored { router, experts, shared, layout, orientation, biases }
            }
            None => Stored { router, experts: router, shared, layout, orientation, biases },
        })
    }

    /// The router's weights.
    pub(super) fn router_weights<'a>(&self, checkpoint: &'a Checkpoint, spec: &MoeSpec) -> Result<RouterWeights<'a>> {
        spec.validate()?;
        let reader = Reader::new(checkpoint);
        let weights = self.read_router(&reader, spec)?;
        let prefix = match self.experts {
            Some(_) => format!("{}{}.", self.prefix, self.names.router),
            None => self.prefix.clone(),
        };
        reader.all_read(self.family, &prefix)?;
        weights.check(spec)?;
        Ok(weights)
    }

    /// The layer's weights; no experts where only a router was resolved.
    pub(super) fn weights<'a>(&self, checkpoint: &'a Checkpoint, spec: &MoeSpec) -> Result<MoeWeights<'a>> {
        let Some(storage) = self.experts else {
            let router = self.router_weights(checkpoint, spec)?;
            return Ok(MoeWeights { router, experts: Vec::new(), shared: None, shared_gate: None });
        };
        spec.validate()?;
        let reader = Reader::new(checkpoint);
        let router = self.read_router(&reader, spec)?;
        let experts = match storage {
            Storage::PerExpert(projections) => (0..spec.num_experts)
                .map(|id| {
                    let module = format!("{}experts.{id}", self.prefix);
                    self.read_mlp(&reader, &module, projections, &spec.experts, spec.hidden_size)
                })
                .collect::<Result<_>>()?,
            Storage::Stacked => self.read_stacked(&reader, spec)?,
        };
        let shared = match (&spec.shared, self.names.shared, self.names.projections) {
            (Some(SharedExperts { mlp, gate, combination: _ }), Some(module), Some(projections)) => {
                // No family here has a gate on it: `check` refuses a spec that was given one.
                match gate {
                    SharedGate::None | SharedGate::Sigmoid { format: _ } => {}
                }
                let module = format!("{}{module}", self.prefix);
                Some(self.read_mlp(&reader, &module, projections, mlp, spec.hidden_size)?)
            }
            // Likewise for a shared expert that was added to the spec of a family without names for it.
            (None, _, _) | (_, None, _) | (_, _, None) => None,
        };
        reader.all_read(self.family, &self.prefix)?;
        let weights = MoeWeights { router, experts, shared, shared_gate: None };
        weights.check(spec)?;
        Ok(weights)
    }

    fn read_router<'a>(&self, reader: &Reader<'a>, spec: &MoeSpec) -> Result<RouterWeights<'a>> {
        let RouterNames { weight, scale, bias, selection_bias, tid2eid } = &self.router;
        let outputs = spec.router_outputs();
        let (matrix, has_bias) = match spec.router {
            Router::Linear { input: _, format, bias, transform: _ } => {
                let shape = [outputs, spec.hidden_size];
                (Some(reader.matrix(weight, scale, format, Orientation::OutIn, Rows::All, None, shape)?), bias)
            }
            Router::Mlp { state_size: _, rms_norm_eps: _ } | Router::Given { transform: _ } => (None, false),
        };
        let vector = |name: &Option<String>, wanted: bool| match name {
            Some(name) if wanted => reader.tensor(name)?.to_f32(outputs).map(Some),
            Some(_) | None => Ok(None),
        };
        let vocab_size = match spec.routing.method {
            RoutingMethod::Hash { score: _, vocab_size } => Some(vocab_size),
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::JointNorm { num_shared: _, global_scale: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => None,
        };
        let table = match (tid2eid, vocab_size) {
            (Some(name), Some(vocab_size)) => {
                let table = reader.tensor(name)?;
                expect_shape(&table, &[vocab_size, spec.top_k])?;
                Some(table.to_i32(vocab_size * spec.top_k)?)
            }
            (Some(_) | None, Some(_) | None) => None,
        };
        Ok(RouterWeights {
            weight: matrix,
            bias: vector(bias, has_bias)?,
            selection_bias: vector(selection_bias, spec.has_selection_bias())?,
            tid2eid: table,
        })
    }

    fn read_mlp<'a>(
        &self,
        reader: &Reader<'a>,
        module: &str,
        [gate, up, down]: [&str; 3],
        mlp: &ExpertMlp,
        hidden_size: usize,
    ) -> Result<MlpWeights<'a>> {
        let scale = self.names.scale;
        let matrix = |part: &str, shape: [usize; 2]| {
            let (weight, scale) = (format!("{module}.{part}.weight"), format!("{module}.{part}.{scale}"));
            reader.matrix(&weight, &scale, mlp.format, Orientation::OutIn, Rows::All, None, shape)
        };
        let inner = mlp.intermediate_size;
        Ok(MlpWeights {
            gate: Some(matrix(gate, [inner, hidden_size])?),
            up: matrix(up, [inner, hidden_size])?,
            down: matrix(down, [hidden_size, inner])?,
            gate_bias: None,
            up_bias: None,
            down_bias: None,
        })
    }

    fn read_stacked<'a>(&self, reader: &Reader<'a>, spec: &MoeSpec) -> Result<Vec<MlpWeights<'a>>> {
        let ExpertMlp {
            intermediate_size,
            activation: _,
            gate_up_layout: layout,
            orientation,
            gate_up_bias,
            down_bias,
            format,
            activation_quant: _,
        } = spec.experts;
        let (hidden, count) = (spec.hidden_size, spec.num_experts);
        let name = |part: &str| format!("{}experts.{part}", self.prefix);
        let (gate_up, down) = (name("gate_up_proj"), name("down_proj"));
        let matrix = |weight: &str, id: usize, part: Rows, shape: [usize; 2]| {
            reader.matrix(weight, &format!("{weight}_scale_inv"), format, orientation, part, Some((id, count)), shape)
        };
        let biases = |name: String, wanted: bool, width: usize| -> Result<Option<Vec<f32>>> {
            if !wanted {
                return Ok(None);
            }
            let tensor = reader.tensor(&name)?;
            expect_shape(&tensor, &[count, width])?;
            tensor.to_f32(count * width).map(Some)
        };
        let gate_up_bias = biases(name("gate_up_proj_bias"), gate_up_bias, 2 * intermediate_size)?;
        let down_bias = biases(name("down_proj_bias"), down_bias, hidden)?;
        (0..count)
            .map(|id| {
                let both = gate_up_bias.as_ref().and_then(|all| all.chunks_exact(2 * intermediate_size).nth(id));
                let (gate_bias, up_bias) = both.map(|both| split(both, layout)).unzip();
                let shape = [intermediate_size, hidden];
                Ok(MlpWeights {
                    gate: Some(matrix(&gate_up, id, Rows::Gate(layout), shape)?),
                    up: matrix(&gate_up, id, Rows::Up(layout), shape)?,
                    down: matrix(&down, id, Rows::All, [hidden, intermediate_size])?,
                    gate_bias,
                    up_bias,
                    down_bias: down_bias.as_ref().and_then(|all| all.chunks_exact(hidden).nth(id)).map(<[f32]>::to_vec),
                })
            })
            .collect()
    }
}

impl RouterNames {
    fn at(prefix: &str, names: &Names) -> Self {
        let name = |part: &'static str| format!("{prefix}{part}");
        let router = name(names.router);
        Self {
            weight: format!("{router}.weight"),
            scale: format!("{router}.{}", names.scale),
            bias: names.router_bias.map(name),
            selection_bias: names.selection_bias.map(name),
            tid2eid: names.tid2eid.map(name),
        }
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

/// Takes tensors and remembers which.
struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Reader<'a> {
    fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, read: RefCell::default() }
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'a>> {
        let tensor = self.checkpoint.tensor(name).ok_or_else(|| missing(self.checkpoint, name.to_owned()))?;
        self.read.borrow_mut().insert(name.to_owned());
        Ok(tensor)
    }

    #[allow(clippy::too_many_arguments, reason = "they are the arguments of Matrix::view, with names for tensors")]
    fn matrix(
        &self,
        weight: &str,
        scale: &str,
        format: WeightFormat,
        orientation: Orientation,
        part: Rows,
        stack: Option<(usize, usize)>,
        shape: [usize; 2],
    ) -> Result<Matrix<'a>> {
        let weight = self.tensor(weight)?;
        let scale = match format {
            WeightFormat::Fp8Block { block: _, scale: _ } => Some(self.tensor(scale)?),
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => None,
        };
        Matrix::view(&weight, scale.as_ref(), format, orientation, part, stack, shape)
    }

    /// Refuses a tensor of the layer that nothing read: leaving it out would change the layer.
    fn all_read(&self, family: &str, prefix: &str) -> Result<()> {
        let read = self.read.borrow();
        let surplus = self.checkpoint.names().find(|name| name.starts_with(prefix) && !read.contains(*name));
        let Some(tensor) = surplus.and_then(|name| self.checkpoint.tensor(name)) else { return Ok(()) };
        Err(Error::Unsupported(Unsupported {
            backend: format!("family {family}").into(),
            field: tensor.name.to_string().into(),
            value: format!("{:?} {:?}", tensor.dtype, tensor.shape),
            because: "neither config.json nor the family has a use for this tensor of the layer".into(),
        }))
    }
}

fn format_of(
    checkpoint: &Checkpoint,
    family: &'static str,
    quantization: Option<&Quantization>,
    weight: &str,
    scale: &str,
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
            let scales = find(scale)?;
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

fn expect_shape(tensor: &Tensor<'_>, expected: &[usize]) -> Result<()> {
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
