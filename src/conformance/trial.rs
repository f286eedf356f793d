//! One witness on one backend: the layer as it is, and every way to drop the field from it.
//! A long file: both mutants and the comparison that has to notice them.

use super::mutants::{self, Lowered};
use super::sample::{LayerInputs, READ, RandomLayer};
use super::witnesses::{Effect, Special, Witness};
use super::{Mutant, Outcome, Status};
use crate::error::{Error, Result};
use crate::host::{Host, decode, encode, poison};
use crate::plan::{self, Io, Plan, Scratch, Tokens};
use crate::reference;
use crate::schedule::{Buffer, Contents, Cuts, EXPERT_MISSES, Options, Schedule, lower};
use crate::spec::{ActivationQuant, CombineRounding, ExpertMlp, FloatType, MoeSpec, Precision, Rounding, Router};
use crate::spec::{ActivationRounding, BlockScale, CombineOrder, Lora, LoraDelta, Placement, SharedExperts, Slot};
use crate::support::Scope;
use crate::weights::MoeWeights;

/// Tokens of the calls: one that the matrix-vector kernels serve, one for those of four rows, one for tiles.
const CALLS: [(&str, usize); 3] = [("decode", 5), ("rows", 17), ("tiled", 48)];
const MAX_TOKENS: usize = 48;
const WEIGHTS: u64 = 21;
const INPUTS: u64 = 22;

const OPTIONS: Options = Options { cuts: Cuts::UpTo([CALLS[0].1, 0, CALLS[1].1, 0, usize::MAX]), ..Options::AUTO };

/// What a device may be off by, relative to the norm of what is compared. A backend is right to about 1e-6. Beside
/// the middle of two values of T, or of two codes, that becomes a step of T or of the codes, in a few values of
/// thousands.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Tolerance(f64);

impl Tolerance {
    const FLOATS: Self = Self(1e-5);
    const ROUNDED: Self = Self(5e-4);
    const CODES: Self = Self(2e-3);
    /// The reference has to move so many times as far from the neutral spec to the other.
    const MOVES: f64 = 1.5;

    fn of(spec: &MoeSpec) -> Self {
        if quantises(spec) {
            Self::CODES
        } else if rounds(spec) {
            Self::ROUNDED
        } else {
            Self::FLOATS
        }
    }
}

/// What a device may be off by on layers of the spec, in [`distance`].
pub(super) fn tolerance(spec: &MoeSpec) -> f64 {
    Tolerance::of(spec).0
}

fn quantises(spec: &MoeSpec) -> bool {
    let shared = spec.shared.as_ref().map(|SharedExperts { mlp, gate: _, combination: _ }| mlp);
    let on = |mlp: &ExpertMlp| mlp.activation_quant != ActivationQuant::None;
    on(&spec.experts) || shared.is_some_and(on)
}

/// Whether anything of a layer is rounded to a narrower type than f32.
pub(super) fn rounds(spec: &MoeSpec) -> bool {
    let Precision {
        input: _,
        output,
        model: _,
        router_gemm,
        routing_weights,
        weighted_input,
        gate_up,
        activation,
        combine,
        combine_order: CombineOrder::Slot | CombineOrder::Expert,
        block_scale: BlockScale::Exact | BlockScale::Promoted | BlockScale::Folded,
    } = &spec.precision;
    let adapters = match &spec.lora {
        Some(Lora { num_adapters: _, rank: _, format: _, delta: LoraDelta::Model }) => true,
        Some(Lora { num_adapters: _, rank: _, format: _, delta: LoraDelta::F32 }) | None => false,
    };
    let steps = [router_gemm, routing_weights, weighted_input, gate_up];
    adapters
        || *output != FloatType::F32
        || steps.into_iter().any(|step| *step == Rounding::Model)
        || *activation != ActivationRounding::F32
        || *combine != CombineRounding::F32
}

/// Both mutants of a witness on a backend.
pub(super) fn try_witness<B: Host + Clone>(backend: &B, witness: &Witness) -> [Outcome; 2] {
    let both = |status: Status, reason: String, because: String| {
        [Mutant::Lower, Mutant::Carrier].map(|mutant| Outcome {
            field: witness.field.clone(),
            mutant,
            backend: backend.facts().backend,
            status,
            witness: witness.name(),
            reason: reason.clone(),
            because: because.clone(),
            carriers: 0,
        })
    };
    match Trial::new(backend, witness) {
        Err(Verdict::Refused { because, reason }) => both(Status::Refused, reason, because),
        Err(Verdict::Broken(reason)) => both(Status::Survived, reason, String::new()),
        Ok(trial) => {
            let (lowered, carried) = (trial.lower(), trial.carriers());
            let [mut lower, mut carrier] = both(Status::Killed, String::new(), String::new());
            (lower.status, lower.reason) = lowered;
            (carrier.status, carrier.reason, carrier.carriers) = carried;
            [lower, carrier]
        }
    }
}

/// Why a witness cannot be tried.
enum Verdict {
    /// The backend, or the rules of the spec, refuse it by the field's name.
    Refused { because: String, reason: String },
    /// The witness or the backend is wrong.
    Broken(String),
}

impl From<Error> for Verdict {
    fn from(error: Error) -> Self {
        Self::Broken(error.to_string())
    }
}

struct Trial<'a, B: Host> {
    backend: &'a B,
    witness: &'a Witness,
    layer: RandomLayer,
    callers: Callers<B>,
    neutral: Lowered,
    spec: Lowered,
    /// What is right, by call.
    wanted: [Observed; CALLS.len()],
    tolerance: f64,
}

/// What leaves a layer, part by part.
pub(super) type Observed = Vec<(&'static str, Vec<f32>)>;

impl<'a, B: Host + Clone> Trial<'a, B> {
    fn new(backend: &'a B, witness: &'a Witness) -> Result<Self, Verdict> {
        let Witness { field, neutral, spec, special, effect } = witness;
        if let Err(error) = spec.validate() {
            let because = "no spec has it".to_owned();
            return Err(Verdict::Refused { reason: format!("{because}: {error}"), because });
        }
        let lowered = |spec: &MoeSpec| lower(spec, Scope::Layer, MAX_TOKENS, &backend.facts(), &OPTIONS);
        let schedule = lowered(spec).map_err(|error| refusal(field, error, ""))?;
        let neutral_schedule =
            lowered(neutral).map_err(|error| refusal(field, error, "what it would be dropped for is refused: "))?;
        let random = |spec: &MoeSpec| {
            let mut layer = RandomLayer::new(spec.clone(), WEIGHTS)?;
            layer.soften_bias();
            Ok::<_, Error>(layer)
        };
        let (layer, neutral_layer) = (random(spec)?, random(neutral)?);
        let inputs = inputs(&layer, *special);
        let [few, some] = [CALLS[0].1, CALLS[1].1].map(|tokens| judge(&layer, &inputs, *special, tokens));
        let (few, some, all) = (few?, some?, judge(&layer, &inputs, *special, MAX_TOKENS)?);
        let tolerance = self::tolerance(neutral).max(self::tolerance(spec));
        // Tensors of the same names are the same in both layers.
        let other = judge(&neutral_layer, &self::inputs(&neutral_layer, *special), *special, MAX_TOKENS)?;
        let moved = distance(&all, &other);
        match effect {
            Effect::Moves if moved > Tolerance::MOVES * tolerance => {}
            Effect::Reads if moved == 0.0 => {}
            Effect::Nothing(because) if moved == 0.0 => {
                let reason = format!("no value of it changes a result: {because}");
                return Err(Verdict::Refused { because: (*because).into(), reason });
            }
            Effect::Moves | Effect::Reads | Effect::Nothing(_) => {
                return Err(Verdict::Broken(format!("the witness moves the reference by {moved:.1e}")));
            }
        }
        let callers = Callers::new(backend, &schedule, spec, &inputs)?;
        let weights = weights(&layer, *special, spec)?;
        weights.check(spec)?;
        let spec_lowered = Lowered::new(schedule, &weights)?;
        let neutral_lowered = Lowered::new(neutral_schedule, &self::weights(&neutral_layer, *special, neutral)?)?;
        let trial = Self {
            backend,
            witness,
            layer: layer.clone(),
            callers,
            neutral: neutral_lowered,
            spec: spec_lowered,
            wanted: [few, some, all],
            tolerance,
        };
        // As users plan it, and as the mutants are planned: both are right.
        let plan = Plan::new(backend.clone(), spec, &weights, MAX_TOKENS, &OPTIONS)?;
        let planned = trial.observe(plan);
        let unchanged = trial.run(&trial.spec);
        for (call, (name, _)) in CALLS.iter().enumerate() {
            for observed in [&planned, &unchanged] {
                match trial.judge(call, observed) {
                    Judgement::Right(_) => {}
                    Judgement::Off(off) => return Err(Verdict::Broken(format!("{name} is wrong by {off:.1e}"))),
                    Judgement::Caught(error) | Judgement::Failed(error) => {
                        return Err(Verdict::Broken(format!("{name} fails: {error}")));
                    }
                }
            }
        }
        Ok(trial)
    }

    /// Lowered as if the field were neutral, and else all that belongs to the field: weights, rows, buffers, judge.
    /// Where lowering does not see the field, it is the weights that are read and cut as if it were neutral.
    fn lower(&self) -> (Status, String) {
        let Witness { field: _, neutral, spec, special, effect: _ } = self.witness;
        let unseen = self.neutral.schedule == self.spec.schedule;
        let observed = weights(&self.layer, *special, if unseen { neutral } else { spec }).and_then(|weights| {
            let fill = plan::fill(&weights.router, Some(&weights));
            Plan::from_schedule(self.backend.clone(), self.neutral.schedule.clone(), &fill)
        });
        let observed = observed.map(|plan| self.observe(plan));
        let observed = observed.unwrap_or_else(Err);
        let mut told = vec![];
        for (call, (name, _)) in CALLS.iter().enumerate() {
            match self.judge(call, &observed) {
                Judgement::Right(off) => return (Status::Survived, format!("{name} is off by {off:.1e} only")),
                Judgement::Failed(error) => return (Status::Survived, format!("the device failed: {error}")),
                Judgement::Caught(error) => return (Status::Killed, error),
                Judgement::Off(off) => told.push(format!("{name} is off by {}", off_by(off))),
            }
        }
        (Status::Killed, told.join(", "))
    }

    /// Each carrier alone.
    fn carriers(&self) -> (Status, String, usize) {
        let carriers = mutants::carriers(&self.neutral, &self.spec);
        let read = differently_read(&self.witness.neutral, &self.witness.spec);
        let count = carriers.len() + read.len();
        if count == 0 {
            return (Status::Survived, "it changes no step, no table and no reading of weights".into(), 0);
        }
        let mut least: Option<(f64, String)> = None;
        let mut typed = 0;
        let mut missed = vec![];
        let mut look =
            |name: &str, call: usize, observed: &Result<[Observed; CALLS.len()]>| match self.judge(call, observed) {
                Judgement::Right(off) => missed.push(format!("{name} ({}): off by {off:.1e} only", CALLS[call].0)),
                Judgement::Failed(error) => missed.push(format!("{name}: the device failed: {error}")),
                Judgement::Caught(_) => typed += 1,
                Judgement::Off(off) => {
                    if least.as_ref().is_none_or(|(least, _)| off < *least) {
                        least = Some((off, name.to_owned()));
                    }
                }
            };
        for carrier in &carriers {
            let observed =
                mutants::neutralised(&self.neutral, &self.spec, carrier).and_then(|mutant| self.run(&mutant));
            for (call, (_, tokens)) in CALLS.iter().enumerate() {
                if carrier.acts_in(self.spec.schedule.bucket(*tokens)) {
                    look(carrier.name(), call, &observed);
                }
            }
        }
        for &matrix in &read {
            let as_in = |name| if name == matrix { &self.witness.neutral } else { &self.witness.spec };
            let observed = self.layer.read(&as_in, &self.witness.spec).and_then(|weights| {
                let mutant = Lowered::new(self.spec.schedule.clone(), &weights)?;
                self.run(&mutant)
            });
            for call in 0..CALLS.len() {
                look(&format!("reading of {matrix}"), call, &observed);
            }
        }
        if !missed.is_empty() {
            return (Status::Survived, missed.join("; "), count);
        }
        let carriers =
            if count == 1 { "its carrier is caught".into() } else { format!("each of {count} carriers is caught") };
        let least = least.map(|(off, name)| format!("least off is {name}, by {}", off_by(off)));
        let typed = (typed > 0).then(|| format!("{typed} calls by a typed error"));
        let how: Vec<String> = least.into_iter().chain(typed).collect();
        (Status::Killed, format!("{carriers}: {}", how.join(", ")), count)
    }

    fn run(&self, lowered: &Lowered) -> Result<[Observed; CALLS.len()]> {
        let fill = mutants::filled(&lowered.words);
        self.observe(Plan::from_schedule(self.backend.clone(), lowered.schedule.clone(), &fill)?)
    }

    /// The calls of a plan, in the buffers that a caller of the spec gives.
    fn observe(&self, plan: Plan<B>) -> Result<[Observed; CALLS.len()]> {
        let scratch: Result<Vec<_>> = plan
            .scratch_layout()
            .buffers
            .into_iter()
            .filter(|(name, _)| !self.callers.has(name))
            .map(|(name, bytes)| Ok((name.clone(), self.backend.create_buffer(&name, bytes, false)?)))
            .collect();
        let buffers: Vec<(String, B::Buffer)> = scratch?;
        let own: Vec<B::Buffer> = buffers.iter().map(|(_, buffer)| buffer.clone()).collect();
        let scratch = Scratch::from_buffers(buffers);
        let bound = plan.bind(&self.callers.io()?, &scratch)?;
        let call = |tokens| {
            // What an earlier call left would hide that a step is missing.
            self.callers.poison(self.backend)?;
            own.iter().try_for_each(|buffer| poison(self.backend, buffer))?;
            let mut encoder = self.backend.encoder();
            bound.record(&mut encoder, &Tokens::Host(tokens))?;
            self.backend.submit(encoder)?;
            let mut observed = self.callers.read(self.backend, &self.witness.spec, tokens)?;
            let misses = scratch.buffer(EXPERT_MISSES).map(|buffer| self.backend.read(buffer)).transpose()?;
            let misses = misses.unwrap_or_default().into_iter().take(self.witness.spec.num_experts);
            observed.push((EXPERT_MISSES, misses.map(|count| count as f32).collect()));
            match self.witness.special {
                Special::Seam => {
                    self.callers.write_routing(self.backend, &self.witness.spec, tokens)?;
                    let mut encoder = self.backend.encoder();
                    bound.record_experts(&mut encoder, &Tokens::Host(tokens))?;
                    self.backend.submit(encoder)?;
                    let again = self.callers.read(self.backend, &self.witness.spec, tokens)?;
                    observed.extend(again.into_iter().take(1).map(|(_, output)| (SEAM, output)));
                }
                Special::No | Special::SmallRows | Special::SpoiledLogits | Special::UnequalReplicas => {}
            }
            Ok::<_, Error>(observed)
        };
        Ok([call(CALLS[0].1)?, call(CALLS[1].1)?, call(CALLS[2].1)?])
    }

    fn judge(&self, call: usize, observed: &Result<[Observed; CALLS.len()]>) -> Judgement {
        match observed {
            Ok(observed) => {
                let off = distance(&self.wanted[call], &observed[call]);
                if off <= self.tolerance { Judgement::Right(off) } else { Judgement::Off(off) }
            }
            Err(error @ (Error::Invalid { .. } | Error::Unsupported(_) | Error::MissingTensor { .. })) => {
                Judgement::Caught(error.to_string())
            }
            // A device that fails shows nothing about a field.
            Err(error) => Judgement::Failed(error.to_string()),
        }
    }
}

/// What became of a call.
enum Judgement {
    /// Within tolerance, off by so much.
    Right(f64),
    /// Beyond it.
    Off(f64),
    /// A typed error.
    Caught(String),
    /// The device failed.
    Failed(String),
}

fn off_by(off: f64) -> String {
    if off.is_finite() { format!("{off:.1e}") } else { "NaN".into() }
}

/// A refusal, if it names the field.
fn refusal(field: &str, error: Error, what: &str) -> Verdict {
    match error {
        Error::Unsupported(refusal) if super::within(&refusal.field, field) => {
            Verdict::Refused { because: refusal.because.to_string(), reason: format!("{what}{refusal}") }
        }
        error => Verdict::Broken(error.to_string()),
    }
}

/// Which matrices a reader takes to be stored otherwise.
fn differently_read(a: &MoeSpec, b: &MoeSpec) -> Vec<&'static str> {
    let stored = |spec: &MoeSpec| {
        let shared = spec.shared.as_ref().map(|SharedExperts { mlp, gate: _, combination: _ }| mlp);
        [Some(&spec.experts), shared].map(|mlp| mlp.map(|mlp| (mlp.gate_up_layout, mlp.orientation)))
    };
    let mut found = vec![];
    for ((a, b), names) in stored(a).into_iter().zip(stored(b)).zip(READ.chunks(3)) {
        let (Some(a), Some(b)) = (a, b) else { continue };
        let differs = [a != b, a != b, a.1 != b.1];
        found.extend(names.iter().zip(differs).filter(|(_, differs)| *differs).map(|(name, _)| *name));
    }
    found
}

fn inputs(layer: &RandomLayer, special: Special) -> LayerInputs {
    let mut inputs = layer.inputs(MAX_TOKENS, INPUTS);
    let shrink = |value: &mut f32| *value *= 2.0f32.powi(-17);
    match special {
        Special::No | Special::Seam | Special::UnequalReplicas => {}
        Special::SmallRows => {
            inputs.hidden_states.iter_mut().for_each(shrink);
            inputs.expert_hidden_states.iter_mut().flatten().for_each(shrink);
        }
        Special::SpoiledLogits => {
            let (outputs, numbers) = (layer.spec.router_outputs(), layer.spec.top_k.saturating_sub(1));
            for (at, logit) in inputs.logits.iter_mut().flatten().enumerate() {
                let (row, output) = (at / outputs, at % outputs);
                let spoiled = row % 2 == 0 && output >= numbers;
                *logit = if spoiled { f32::NAN } else { ((row * 7 + output * 5) % 11) as f32 / 4.0 };
            }
        }
    }
    inputs
}

/// The weights that a reader finds who takes the layer's to be those of `spec`.
fn weights<'a>(layer: &'a RandomLayer, special: Special, spec: &'a MoeSpec) -> Result<MoeWeights<'a>> {
    let mut weights = layer.read(&|_| spec, spec)?;
    match special {
        Special::No | Special::SmallRows | Special::SpoiledLogits | Special::Seam => {}
        Special::UnequalReplicas => {
            let first = weights.experts.clone();
            for (slot, mlp) in weights.experts.iter_mut().enumerate().skip(spec.num_experts) {
                mlp.clone_from(&first[(slot + 1) % spec.num_experts]);
            }
        }
    }
    Ok(weights)
}

/// The rows of the first tokens; a batched entry has no fewer.
fn first(inputs: &LayerInputs, spec: &MoeSpec, tokens: usize) -> LayerInputs {
    let mut first = inputs.clone();
    if spec.entry.is_batched() {
        return first;
    }
    let LayerInputs {
        hidden_states,
        token_ids,
        expert_hidden_states,
        logits,
        router_states,
        adapter_ids,
        counts: _,
        row_weights: _,
    } = &mut first;
    let cut = |values: Option<&mut Vec<f32>>, width: usize| {
        if let Some(values) = values {
            values.truncate(tokens * width);
        }
    };
    cut(Some(hidden_states), spec.hidden_size);
    cut(expert_hidden_states.as_mut(), spec.hidden_size);
    cut(logits.as_mut(), spec.router_outputs());
    cut(router_states.as_mut(), state_size(spec));
    token_ids.iter_mut().for_each(|ids| ids.truncate(tokens));
    adapter_ids.iter_mut().for_each(|ids| ids.truncate(tokens));
    first
}

fn state_size(spec: &MoeSpec) -> usize {
    match spec.router {
        Router::Mlp { state_size, rms_norm_eps: _, previous_state: _, format: _ } => state_size,
        Router::Linear { input: _, format: _, bias: _, transform: _ } | Router::Given { transform: _ } => 0,
    }
}

/// What is right for the first tokens.
fn judge(layer: &RandomLayer, inputs: &LayerInputs, special: Special, tokens: usize) -> Result<Observed> {
    let (spec, inputs) = (&layer.spec, first(inputs, &layer.spec, tokens));
    let weights = weights(layer, special, spec)?;
    let reference::Layer { routed, mut output } = reference::layer(spec, &weights, inputs.view())?;
    // Each row of a batched entry is by itself.
    output.truncate(tokens * spec.hidden_size);
    let behind_seam = match special {
        Special::Seam => {
            let (topk_ids, topk_weights) = callers_routing(spec, tokens);
            let routed = reference::Routed { topk_ids, topk_weights, ..routed.clone() };
            reference::experts(spec, &weights, inputs.view(), &routed)?
        }
        Special::No | Special::SmallRows | Special::SpoiledLogits | Special::UnequalReplicas => vec![],
    };
    let reference::Routed { logits: _, topk_ids, topk_weights, shared_weights, router_states } = routed;
    let misses = match spec.placement {
        Placement::All | Placement::Range { first: _, count: _ } => vec![],
        Placement::Map { num_slots: _, replicas: _, slots: _ } => {
            let mut misses = vec![0.0; spec.num_experts];
            for (row, id) in topk_ids.iter().enumerate() {
                let id = usize::try_from(*id).ok().filter(|id| *id < spec.num_experts);
                if let Some(id) = id.filter(|id| spec.placement.slot(*id, row / spec.top_k) == Slot::Missing) {
                    misses[id] += 1.0;
                }
            }
            misses
        }
    };
    Ok(vec![
        ("output", output),
        ("topk_weights", topk_weights),
        ("shared_weights", shared_weights),
        ("router_states", router_states),
        (EXPERT_MISSES, misses),
        (SEAM, behind_seam),
    ])
}

/// The output behind ids and weights of a caller's.
const SEAM: &str = "output of record_experts";

/// Ids and weights of a caller who routes for himself: of every selectable output.
fn callers_routing(spec: &MoeSpec, tokens: usize) -> (Vec<i32>, Vec<f32>) {
    let slots = (0..tokens).flat_map(|token| (0..spec.top_k).map(move |slot| (token, slot)));
    let id = |(token, slot): (usize, usize)| ((5 * token + 7 * slot) % spec.selectable()) as i32;
    (slots.clone().map(id).collect(), slots.map(|(_, slot)| 0.25 * (slot + 1) as f32).collect())
}

/// rel_fro: what two results differ by, relative to the first; the largest of their parts. What is no number is
/// infinitely far from what is one.
pub(super) fn distance(wanted: &Observed, found: &Observed) -> f64 {
    let part = |name: &str, wanted: &[f32]| {
        let found = found.iter().find(|(other, _)| *other == name).map_or(&[][..], |(_, values)| values);
        if found.len() != wanted.len() {
            return f64::INFINITY;
        }
        let (mut off, mut norm) = (0.0f64, 0.0f64);
        for (wanted, found) in wanted.iter().zip(found) {
            if wanted.is_finite() && found.is_finite() {
                off += (f64::from(*wanted) - f64::from(*found)).powi(2);
                norm += f64::from(*wanted).powi(2);
            } else if !(wanted == found || wanted.is_nan() && found.is_nan()) {
                return f64::INFINITY;
            }
        }
        if off == 0.0 { 0.0 } else { off.sqrt() / norm.sqrt() }
    };
    wanted.iter().map(|(name, wanted)| part(name, wanted)).fold(0.0, f64::max)
}

/// The buffers that a caller gives, made for the spec.
struct Callers<B: Host> {
    buffers: Vec<(Buffer, B::Buffer)>,
}

impl<B: Host> Callers<B> {
    fn new(backend: &B, schedule: &Schedule, spec: &MoeSpec, inputs: &LayerInputs) -> Result<Self> {
        let LayerInputs {
            hidden_states,
            token_ids,
            expert_hidden_states,
            logits,
            router_states,
            adapter_ids,
            counts,
            row_weights,
        } = inputs;
        let rows = |values: &[f32]| encode(spec.precision.input, values);
        let floats = |values: &Option<Vec<f32>>| encode(FloatType::F32, values.as_deref().unwrap_or(&[]));
        let mut buffers = vec![];
        for buffer in &schedule.buffers {
            let words = match buffer.contents {
                Contents::HiddenStates => Some(rows(hidden_states)),
                Contents::TokenIds => token_ids.clone(),
                Contents::ExpertHiddenStates => expert_hidden_states.as_deref().map(rows),
                Contents::GivenLogits => Some(floats(logits)),
                Contents::PreviousRouterStates => Some(floats(router_states)),
                Contents::AdapterIds => adapter_ids.as_deref().map(|ids| bytemuck::cast_slice(ids).to_vec()),
                Contents::Counts => counts.clone(),
                Contents::RowWeights => Some(floats(row_weights)),
                Contents::Output
                | Contents::TopkIds
                | Contents::TopkWeights
                | Contents::RouterStates
                | Contents::SharedWeights => Some(vec![]),
                Contents::Scratch
                | Contents::Params
                | Contents::Segment { matrix: _, segment: _ }
                | Contents::Spans { matrix: _, segment: _ }
                | Contents::Table(_) => None,
            };
            if let Some(words) = words {
                let handle = backend.create_buffer(&buffer.name, mutants::ROOM * buffer.bytes, false)?;
                poison(backend, &handle)?;
                backend.write(&handle, 0, &words)?;
                buffers.push((buffer.clone(), handle));
            }
        }
        Ok(Self { buffers })
    }

    /// What no call has written shows.
    fn poison(&self, backend: &B) -> Result<()> {
        let written = |buffer: &Buffer| match buffer.contents {
            Contents::Output
            | Contents::TopkIds
            | Contents::TopkWeights
            | Contents::RouterStates
            | Contents::SharedWeights => true,
            Contents::HiddenStates
            | Contents::TokenIds
            | Contents::ExpertHiddenStates
            | Contents::AdapterIds
            | Contents::Counts
            | Contents::RowWeights
            | Contents::GivenLogits
            | Contents::PreviousRouterStates
            | Contents::Scratch
            | Contents::Params
            | Contents::Segment { matrix: _, segment: _ }
            | Contents::Spans { matrix: _, segment: _ }
            | Contents::Table(_) => false,
        };
        self.buffers.iter().filter(|(buffer, _)| written(buffer)).try_for_each(|(_, handle)| poison(backend, handle))
    }

    fn write_routing(&self, backend: &B, spec: &MoeSpec, tokens: usize) -> Result<()> {
        let (ids, weights) = callers_routing(spec, tokens);
        let write =
            |contents, words: &[u32]| self.of(contents).map_or(Ok(()), |buffer| backend.write(buffer, 0, words));
        write(Contents::TopkIds, bytemuck::cast_slice(&ids))?;
        write(Contents::TopkWeights, bytemuck::cast_slice(&weights))
    }

    fn io(&self) -> Result<Io<'_, B>> {
        let of = |contents| self.of(contents);
        let lacks = || Error::invalid("hidden_states", "no buffer", "one", "this is a fault of lower");
        Ok(Io {
            hidden_states: of(Contents::HiddenStates).ok_or_else(lacks)?,
            token_ids: of(Contents::TokenIds),
            output: of(Contents::Output),
            topk_ids: of(Contents::TopkIds),
            topk_weights: of(Contents::TopkWeights).or_else(|| of(Contents::RowWeights)),
            expert_hidden_states: of(Contents::ExpertHiddenStates),
            logits: of(Contents::GivenLogits),
            previous_router_states: of(Contents::PreviousRouterStates),
            router_states: of(Contents::RouterStates),
            shared_weights: of(Contents::SharedWeights),
            adapter_ids: of(Contents::AdapterIds),
            counts: of(Contents::Counts),
            expert_slots: None,
        })
    }

    /// What a caller of the spec finds for its first tokens.
    fn read(&self, backend: &B, spec: &MoeSpec, tokens: usize) -> Result<Observed> {
        let read = |contents, float_type, width: usize| match self.of(contents) {
            Some(buffer) => Ok::<_, Error>(decode(float_type, &backend.read(buffer)?, tokens * width)),
            None => Ok(vec![]),
        };
        let float = FloatType::F32;
        Ok(vec![
            ("output", read(Contents::Output, spec.precision.output, spec.hidden_size)?),
            ("topk_weights", read(Contents::TopkWeights, float, spec.top_k)?),
            ("shared_weights", read(Contents::SharedWeights, float, spec.joint_shares())?),
            ("router_states", read(Contents::RouterStates, float, state_size(spec))?),
        ])
    }

    fn of(&self, contents: Contents) -> Option<&B::Buffer> {
        self.buffers.iter().find(|(buffer, _)| buffer.contents == contents).map(|(_, handle)| handle)
    }

    fn has(&self, name: &str) -> bool {
        self.buffers.iter().any(|(buffer, _)| buffer.name == name)
    }
}
