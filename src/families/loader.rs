//! From the names of tensors to the weights of a layer.

use std::collections::BTreeSet;

use super::model::{Block, Gate, RouterKind, Shared};
use super::names::{Mlp, Names, Site};
use super::quantization::Quantization;
use super::reader::{Index, Place, Reader, expect_shape};
use super::reading::Reading;
use super::tensors;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::spec::{
    GateUpLayout, Latent, LatentNorm, MoeSpec, Orientation, Router, RouterInput, RoutingMethod, SharedExperts,
    SharedGate, WeightFormat,
};
use crate::weights::{LatentNormWeights, LatentWeights, Matrix, MoeWeights, RouterMlpWeights, RouterWeights};

pub(super) use super::reader::missing;

/// Where a layer's tensors are.
#[derive(Debug, Clone)]
pub(super) struct Source {
    /// For messages.
    family: &'static str,
    names: &'static Names,
    quantization: Option<Quantization>,
    /// What the names of the layer begin with; every tensor that does has to be read.
    owned: Vec<String>,
    /// `None` if the router is alone in its checkpoint.
    site: Option<Site>,
    router: RouterNames,
    experts: Option<Place>,
}

#[derive(Debug, Clone)]
struct RouterNames {
    /// What the names of the router's parts begin with.
    prefix: String,
    weight: String,
    bias: Option<String>,
    selection_bias: Option<String>,
    tid2eid: Option<String>,
    input_scale: Option<String>,
    per_expert_scale: Option<String>,
    global_scale: Option<String>,
}

/// How the parts of a layer are stored, as far as the spec says it.
pub(super) struct Stored {
    pub(super) router: WeightFormat,
    pub(super) experts: StoredMlp,
    pub(super) shared: Option<StoredMlp>,
    /// Of the shared expert's gate, where there is one.
    pub(super) shared_gate: WeightFormat,
    /// Of the latent projections, where there are some.
    pub(super) latent: WeightFormat,
}

/// How an MLP is stored.
pub(super) struct StoredMlp {
    pub(super) format: WeightFormat,
    pub(super) rows: GateUpLayout,
    pub(super) orientation: Orientation,
    /// Whether its tensors are values without scales.
    pub(super) plain: bool,
    /// Whether it says what a static scheme divides inputs by.
    pub(super) input_scales: bool,
}

impl StoredMlp {
    /// Tensors of their own, [out, in].
    fn separate(format: WeightFormat) -> Self {
        let (rows, orientation) = (GateUpLayout::Separate, Orientation::OutIn);
        Self { format, rows, orientation, plain: true, input_scales: false }
    }
}

impl Source {
    /// The whole layer at a site.
    pub(super) fn layer(checkpoint: &Checkpoint, reading: &Reading, site: &Site) -> Result<Self> {
        let names = reading.names;
        let experts = place(checkpoint, reading.quantization.as_ref(), names, site, names.experts, true)?;
        let router = RouterNames::at(checkpoint, names, site);
        Ok(Self::new(reading, site.owned(names), Some(site), router, Some(experts)))
    }

    /// Only the router of a site.
    pub(super) fn router_of_layer(checkpoint: &Checkpoint, reading: &Reading, site: &Site) -> Self {
        let router = RouterNames::at(checkpoint, reading.names, site);
        Self::new(reading, vec![router.prefix.clone()], Some(site), router, None)
    }

    /// A router that is alone in its checkpoint, its tensors named by their last component.
    pub(super) fn bare_router(checkpoint: &Checkpoint, reading: &Reading, router: RouterKind) -> Result<Self> {
        let router = RouterNames::bare(checkpoint, reading.names, router)?;
        Ok(Self::new(reading, vec![String::new()], None, router, None))
    }

    fn new(
        reading: &Reading,
        owned: Vec<String>,
        site: Option<&Site>,
        router: RouterNames,
        experts: Option<Place>,
    ) -> Self {
        let (family, names, quantization) = (reading.family.name, reading.names, reading.quantization.clone());
        Self { family, names, quantization, owned, site: site.cloned(), router, experts }
    }

    fn reader<'a>(&self, checkpoint: &'a Checkpoint) -> Reader<'a, '_> {
        Reader::new(checkpoint, self.family, self.quantization.as_ref())
    }

    /// Whether no expert is to be read.
    pub(super) fn is_router_only(&self) -> bool {
        self.experts.is_none()
    }

    /// How the layer is stored: dtypes and shapes of its tensors.
    pub(super) fn stored(&self, checkpoint: &Checkpoint, block: &Block) -> Result<Stored> {
        let reader = self.reader(checkpoint);
        let format = |weight: &str| reader.tensors(weight).map(|tensors| tensors.format);
        let router = match (block.router, self.names.router_mlp) {
            (RouterKind::Mlp { state_size: _, rms_norm_eps: _, previous_state: _ }, Some(parts)) => {
                format(&format!("{}{}.weight", self.router.prefix, parts.down))?
            }
            (RouterKind::Mlp { state_size: _, rms_norm_eps: _, previous_state: _ }, None)
            | (RouterKind::Linear { input: _, bias: _, transform: _ }, _) => format(&self.router.weight)?,
        };
        let (Some(experts), Some(site)) = (&self.experts, &self.site) else {
            // Without expert tensors the spec still needs formats; see `resolve_router`.
            let shared = block.shared.map(|_| StoredMlp::separate(router));
            return Ok(Stored {
                router,
                experts: StoredMlp::separate(router),
                shared,
                shared_gate: router,
                latent: router,
            });
        };
        let stored = |place: &Place, width: usize, inner: usize, index: Index| -> Result<StoredMlp> {
            let (tensors, format) = reader.probe(place, index)?;
            let (plain, input_scales) = (tensors.is_plain(), tensors.input_scale.is_some());
            let (rows, orientation) = place.stored_as(checkpoint, [inner, width], index, plain)?;
            Ok(StoredMlp { format, rows, orientation, plain, input_scales })
        };
        let width = block.latent.map_or(block.hidden_size, |(size, _)| size);
        let shared = match block.shared {
            None => None,
            Some(shared) => {
                let (place, index) = self.shared(checkpoint, site, &shared, block.joint_shares())?;
                Some(stored(&place, block.hidden_size, shared.width, index)?)
            }
        };
        let gated = block.shared.is_some_and(|shared| shared.gate == Gate::Sigmoid);
        let gate = pick(checkpoint, self.names, site, self.names.shared_gate);
        Ok(Stored {
            router,
            experts: stored(experts, width, block.intermediate_size, Index::Of(block.num_experts))?,
            shared,
            shared_gate: if gated { gate.map_or(Ok(router), |name| format(&name))? } else { router },
            latent: match (block.latent, self.names.latent) {
                (Some(_), Some(latent)) => format(&format!("{}.weight", site.name(self.names, latent.down)))?,
                (Some(_) | None, _) => router,
            },
        })
    }

    /// Where the shared experts are, and how many MLPs they are.
    fn shared(&self, checkpoint: &Checkpoint, site: &Site, shared: &Shared, shares: usize) -> Result<(Place, Index)> {
        let place = place(checkpoint, self.quantization.as_ref(), self.names, site, self.names.shared, false)?;
        Ok((place, if shared.gate == Gate::Joint { Index::Of(shares) } else { Index::One }))
    }

    /// The router's weights.
    pub(super) fn router_weights<'a>(&self, checkpoint: &'a Checkpoint, spec: &MoeSpec) -> Result<RouterWeights<'a>> {
        spec.validate()?;
        let reader = self.reader(checkpoint);
        let weights = self.read_router(&reader, spec)?;
        let owned = match self.site {
            Some(_) => vec![self.router.prefix.clone()],
            None => self.owned.clone(),
        };
        reader.all_read(&owned)?;
        weights.check(spec)?;
        Ok(weights)
    }

    /// The layer's weights; no experts where only a router was resolved.
    pub(super) fn weights<'a>(&self, checkpoint: &'a Checkpoint, spec: &MoeSpec) -> Result<MoeWeights<'a>> {
        let (Some(experts), Some(site)) = (&self.experts, &self.site) else {
            return Ok(MoeWeights {
                router: self.router_weights(checkpoint, spec)?,
                experts: Vec::new(),
                lora: Vec::new(),
                shared: Vec::new(),
                shared_gate: None,
                latent: None,
                output_bias: None,
                output_norm: None,
            });
        };
        spec.validate()?;
        let reader = self.reader(checkpoint);
        let router = self.read_router(&reader, spec)?;
        let count = Index::Of(spec.num_experts);
        let experts = reader.mlps(experts, &spec.experts, spec.expert_width(), count, spec.selectable())?;
        let (shared, shared_gate) = match &spec.shared {
            None => (Vec::new(), None),
            Some(SharedExperts { mlp, gate, combination: _ }) => {
                let place = place(checkpoint, self.quantization.as_ref(), self.names, site, self.names.shared, false)?;
                let index = match gate {
                    SharedGate::Joint => Index::Of(spec.joint_shares()),
                    SharedGate::None | SharedGate::Sigmoid { format: _ } => Index::One,
                };
                let row = match gate {
                    SharedGate::None | SharedGate::Joint => None,
                    SharedGate::Sigmoid { format } => {
                        let name = pick(checkpoint, self.names, site, self.names.shared_gate).unwrap_or_default();
                        Some(reader.row(&name, *format, spec.hidden_size)?)
                    }
                };
                (reader.mlps(&place, mlp, spec.hidden_size, index, spec.joint_shares())?, row)
            }
        };
        let latent = spec.latent.as_ref().map(|latent| self.read_latent(&reader, site, latent, spec.hidden_size));
        let row = |spellings, wanted: bool| match pick(checkpoint, self.names, site, spellings) {
            Some(name) if wanted => reader.vector(&name, spec.hidden_size).map(Some),
            Some(_) | None => Ok(None),
        };
        let output_bias = row(self.names.output_bias, spec.output_bias)?;
        let output_norm = row(self.names.output_norm, spec.output_norm.is_some())?;
        let latent = latent.transpose()?;
        let lora = Vec::new();
        let whole = MoeWeights { router, experts, lora, shared, shared_gate, latent, output_bias, output_norm };
        reader.all_read(&self.owned)?;
        whole.part(spec)
    }

    fn read_router<'a>(&self, reader: &Reader<'a, '_>, spec: &MoeSpec) -> Result<RouterWeights<'a>> {
        let RouterNames {
            prefix: _,
            weight,
            bias,
            selection_bias,
            tid2eid,
            input_scale,
            per_expert_scale,
            global_scale,
        } = &self.router;
        let outputs = spec.router_outputs();
        let vector = |name: &Option<String>, wanted: bool, len: usize| match name {
            Some(name) if wanted => reader.vector(name, len).map(Some),
            Some(_) | None => Ok(None),
        };
        let (matrix, mlp, has_bias, scaled) = match &spec.router {
            Router::Linear { input, format, bias, transform: _ } => {
                let matrix = reader.plain(weight, *format, [outputs, spec.hidden_size])?;
                let scaled = match input {
                    RouterInput::Hidden => false,
                    RouterInput::RmsNormScaled { eps: _ } => true,
                };
                (Some(matrix), None, *bias, scaled)
            }
            Router::Mlp { state_size, rms_norm_eps: _, previous_state, format } => {
                let sizes = [spec.hidden_size, *state_size, outputs];
                (None, self.read_router_mlp(reader, sizes, *previous_state, *format)?, false, false)
            }
            Router::Given { transform: _ } => (None, None, false, false),
        };
        let (vocab_size, has_global_scale) = match spec.routing.method {
            RoutingMethod::Hash { score: _, vocab_size } => (Some(vocab_size), false),
            RoutingMethod::JointNorm { num_shared: _, global_scale } => (None, global_scale),
            RoutingMethod::TopK { score: _, key: _, groups: _ }
            | RoutingMethod::TopKThenScore { score: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => (None, false),
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
            bias: vector(bias, has_bias, outputs)?,
            selection_bias: vector(selection_bias, spec.has_selection_bias(), spec.selectable())?,
            tid2eid: table,
            input_scale: vector(input_scale, scaled, spec.hidden_size)?,
            per_expert_scale: vector(per_expert_scale, spec.routing.per_expert_scale, spec.num_experts)?,
            global_scale: vector(global_scale, has_global_scale, 1)?.and_then(|one| one.first().copied()),
            mlp,
        })
    }

    fn read_router_mlp<'a>(
        &self,
        reader: &Reader<'a, '_>,
        [hidden_size, state, outputs]: [usize; 3],
        previous_state: bool,
        format: WeightFormat,
    ) -> Result<Option<RouterMlpWeights<'a>>> {
        let Some(parts) = self.names.router_mlp else { return Ok(None) };
        let matrix = |part: &str, shape: [usize; 2]| -> Result<Matrix<'a>> {
            reader.plain(&format!("{}{part}.weight", self.router.prefix), format, shape)
        };
        let vector = |part: String| reader.vector(&format!("{}{part}", self.router.prefix), state);
        let bias = |part: &str| vector(format!("{part}.bias"));
        Ok(Some(RouterMlpWeights {
            down: matrix(parts.down, [state, hidden_size])?,
            down_bias: bias(parts.down)?,
            states_scale: previous_state.then(|| vector(parts.states_scale.to_owned())).transpose()?,
            norm: vector(parts.norm.to_owned())?,
            fc1: matrix(parts.fc1, [state, state])?,
            fc1_bias: bias(parts.fc1)?,
            fc2: matrix(parts.fc2, [state, state])?,
            fc2_bias: bias(parts.fc2)?,
            out: matrix(parts.out, [outputs, state])?,
        }))
    }

    fn read_latent<'a>(
        &self,
        reader: &Reader<'a, '_>,
        site: &Site,
        Latent { size, format, norm }: &Latent,
        hidden_size: usize,
    ) -> Result<LatentWeights<'a>> {
        let Some(names) = self.names.latent else {
            return Err(missing(reader.checkpoint, "projections to and from a latent width".into()));
        };
        let matrix = |part: &str, shape: [usize; 2]| {
            reader.plain(&format!("{}.weight", site.name(self.names, part)), *format, shape)
        };
        let vector = |part: &str| -> Result<Vec<f32>> {
            let stored = reader.vector(&site.name(self.names, part), *size)?;
            Ok(if names.zero_centred { stored.iter().map(|weight| 1.0 + weight).collect() } else { stored })
        };
        Ok(LatentWeights {
            down: matrix(names.down, [*size, hidden_size])?,
            up: matrix(names.up, [hidden_size, *size])?,
            norm: match norm {
                LatentNorm::None => LatentNormWeights::None,
                LatentNorm::Reduced { eps: _ } => LatentNormWeights::Reduced(vector(names.norm)?),
                LatentNorm::PreAndPost { pre_eps: _, post_eps: _ } => {
                    LatentNormWeights::PreAndPost { pre: vector(names.norm)?, post: vector(names.post_norm)? }
                }
            },
        })
    }
}

/// The first spelling that the checkpoint has, else the first at all.
fn pick(checkpoint: &Checkpoint, names: &Names, site: &Site, spellings: &[&'static str]) -> Option<String> {
    let full = |part: &&str| site.name(names, part);
    let there = spellings.iter().map(full).find(|name| checkpoint.tensor(name).is_some());
    there.or_else(|| spellings.first().map(full))
}

/// The first of these layouts that the checkpoint has.
fn place(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    names: &'static Names,
    site: &Site,
    mlps: &'static [Mlp],
    indexed: bool,
) -> Result<Place> {
    let index = if indexed { Index::Of(1) } else { Index::One };
    let places = || {
        mlps.iter().map(|mlp| {
            // Gives the path up to the part; a module of its own or the block itself.
            let path = match mlp.module.is_empty() {
                true => site.name(names, ""),
                false => format!("{}.", site.name(names, mlp.module)),
            };
            Place { path, layout: &mlp.layout }
        })
    };
    if let Some(found) = places().find(|place| tensors::codes_name(checkpoint, &place.probe(index)).is_some()) {
        return Ok(found);
    }
    let codes = |place: Place| tensors::expected_codes(&place.probe(index), quantization);
    let tried: BTreeSet<String> = places().map(codes).collect();
    let tried: Vec<String> = tried.into_iter().collect();
    Err(missing(checkpoint, tried.join(" or ")))
}

impl RouterNames {
    fn at(checkpoint: &Checkpoint, names: &Names, site: &Site) -> Self {
        let full = |router: &&str| format!("{}.", site.name(names, router));
        let there = |prefix: &String| checkpoint.names().any(|name| name.starts_with(prefix.as_str()));
        let prefix = names.router.iter().map(full).find(there).or_else(|| names.router.first().map(full));
        let prefix = prefix.unwrap_or_default();
        let pick = |spellings| pick(checkpoint, names, site, spellings);
        Self {
            weight: format!("{prefix}weight"),
            prefix,
            bias: pick(names.router_bias),
            selection_bias: pick(names.selection_bias),
            tid2eid: pick(names.tid2eid),
            input_scale: pick(names.input_scale),
            per_expert_scale: pick(names.per_expert_scale),
            global_scale: pick(names.global_scale),
        }
    }

    fn bare(checkpoint: &Checkpoint, names: &Names, router: RouterKind) -> Result<Self> {
        let last = |name: &'static str| name.rsplit('.').next().unwrap_or(name);
        let find = |spellings: &BTreeSet<&str>| -> Result<Option<String>> {
            let named = |name: &&str| name.rsplit('.').next().is_some_and(|last| spellings.contains(last));
            let found: Vec<&str> = checkpoint.names().filter(named).collect();
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
        let optional = |spellings: &'static [&'static str]| -> Result<Option<String>> {
            let found = find(&spellings.iter().copied().map(last).collect())?;
            Ok(found.or_else(|| spellings.first().map(|name| (*name).to_owned())))
        };
        let spelt = names.router.first().copied().unwrap_or("router");
        let (prefix, weight) = match (router, names.router_mlp) {
            (RouterKind::Mlp { state_size: _, rms_norm_eps: _, previous_state: _ }, Some(parts)) => {
                let norm = checkpoint.names().find_map(|name| name.strip_suffix(parts.norm));
                let prefix = norm.ok_or_else(|| missing(checkpoint, format!("{spelt}.{}", parts.norm)))?;
                (prefix.to_owned(), String::new())
            }
            (RouterKind::Mlp { state_size: _, rms_norm_eps: _, previous_state: _ }, None)
            | (RouterKind::Linear { input: _, bias: _, transform: _ }, _) => {
                let weight = find(&BTreeSet::from(["weight"]))?;
                let weight = weight.ok_or_else(|| missing(checkpoint, format!("{spelt}.weight")))?;
                (weight.strip_suffix("weight").unwrap_or("").to_owned(), weight)
            }
        };
        // Whatever the checkpoints call it, a router by itself calls it so.
        let mut selection_bias: BTreeSet<&str> = names.selection_bias.iter().copied().map(last).collect();
        if !selection_bias.is_empty() {
            selection_bias.insert("e_score_correction_bias");
        }
        Ok(Self {
            prefix,
            weight,
            bias: optional(names.router_bias)?,
            selection_bias: find(&selection_bias)?.or_else(|| names.selection_bias.first().map(|&name| name.into())),
            tid2eid: optional(names.tid2eid)?,
            input_scale: optional(names.input_scale)?,
            per_expert_scale: optional(names.per_expert_scale)?,
            global_scale: optional(names.global_scale)?,
        })
    }
}
