//! Known answers: small layers that together run every kernel which a device could get, with every fragment. Each
//! step is compared with its twin, each layer with the reference.
//!
//! The layers are chosen, not written: of all witnesses' specs, and of every schedule that a device makes of them,
//! the fewest that bring each fragment into each kernel. So a kernel that `lower` learns to choose is run as soon as
//! some witness gets it.

use std::collections::{BTreeMap, BTreeSet};

use super::lockstep::{self, Compared};
use super::sample::{self, LayerInputs, RandomLayer};
use super::trial::{Observed, distance, tolerance};
use super::{spread, witnesses};
use crate::backend::cpu::Cpu;
use crate::error::Result;
use crate::host::{Host, Outcome, Session};
use crate::kernels::{Operation, Source, Value};
use crate::plan::{Backend as _, Plan};
use crate::reference::{self, Routed};
use crate::schedule::{Cut, Cuts, DeviceFacts, Options, Schedule, lower};
use crate::spec::{
    ActivationCode, ActivationQuant, ActivationRounding, ActivationScale, BlockScale, CombineRounding, FloatType,
    MoeSpec, Precision, ScaleFormat, ScaleRule, ScaleSpan, WeightFormat,
};
use crate::support::Scope;

/// More than a tile has, and no multiple of anything.
const MAX_TOKENS: usize = 70;
/// The bounds of witnesses, which stood on the devices that were tried, are multiplied by this for one that was not: an
/// error that a division by a small sum makes larger may be several times as large there.
const SLACK: f64 = 4.0;
const WEIGHTS: u64 = 31;
const INPUTS: u64 = 32;

/// A kernel, stage and variant, and a fragment of it.
pub type Piece = (&'static str, &'static str);

/// A layer, and how it is planned.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// The field whose witness it is.
    pub field: String,
    /// What it computes.
    pub spec: MoeSpec,
    /// With what choices.
    pub options: Options,
}

impl Known {
    fn schedule(&self, facts: &DeviceFacts) -> Result<Schedule> {
        lower(&self.spec, Scope::Layer, MAX_TOKENS, facts, &self.options)
    }

    /// The same layer with rows as long as real ones: several vectors an invocation, several blocks, several stages.
    fn widened(&self, facts: &DeviceFacts) -> Option<Self> {
        // Whole super-blocks of 256, and an odd number of them.
        const HIDDEN_SIZE: usize = 1280;
        let mut wide = self.clone();
        wide.spec.hidden_size = HIDDEN_SIZE;
        wide.schedule(facts).is_ok().then_some(wide)
    }

    /// A number of tokens for each bucket that a call can reach: one less than it has room for.
    fn calls(&self, schedule: &Schedule) -> Vec<usize> {
        if self.spec.entry.is_batched() {
            return vec![schedule.max_tokens];
        }
        schedule.buckets.iter().map(|bucket| bucket.max_tokens.saturating_sub(1).max(1)).collect()
    }

    /// What its calls run.
    fn operations<'a>(&self, schedule: &'a Schedule) -> impl Iterator<Item = (&'a str, &'a Operation)> {
        let buckets: BTreeSet<usize> = self.calls(schedule).into_iter().map(|tokens| schedule.bucket(tokens)).collect();
        let steps = buckets.into_iter().flat_map(|bucket| &schedule.buckets[bucket].steps);
        steps.map(|step| (step.name.as_str(), &step.operation))
    }
}

/// The layers for a device.
#[derive(Debug, Clone)]
pub struct Catalogue {
    /// The layers.
    pub layers: Vec<Known>,
    /// What they run, each text once.
    pub kernels: BTreeMap<String, Source>,
}

impl Catalogue {
    /// Chooses them.
    pub fn new(facts: &DeviceFacts) -> Self {
        let mut run = BTreeSet::new();
        let mut layers = cover(candidates(), facts, &mut run);
        let wide: Vec<Known> = layers.iter().filter_map(|known| known.widened(facts)).collect();
        // What needs two or three fields at once, such as a kind of quantisation and the activation fused with it.
        let mut newest = layers.clone();
        while !newest.is_empty() {
            newest = cover(grafted(&newest), facts, &mut run);
            layers.extend(newest.iter().cloned());
        }
        layers.extend(wide);
        let schedules = layers.iter().filter_map(|known| known.schedule(facts).ok().map(|schedule| (known, schedule)));
        let kernels = schedules.flat_map(|(known, schedule)| {
            let sources: Vec<Source> = known.operations(&schedule).map(|(_, operation)| operation.source()).collect();
            sources.into_iter().map(|source| (source.wgsl(), source))
        });
        Self { kernels: kernels.collect(), layers }
    }

    /// Every kernel with every fragment that is run.
    pub fn pieces(&self) -> BTreeSet<Piece> {
        self.kernels.values().flat_map(pieces).collect()
    }

    /// The kernels whose code, comments left out, has a word that begins so.
    pub fn kernels_with(&self, word: &str) -> BTreeSet<&'static str> {
        let code = |text: &str| text.lines().any(|line| line.split("//").next().is_some_and(|line| has(line, word)));
        self.kernels.iter().filter(|(text, _)| code(text)).map(|(_, source)| source.kernel()).collect()
    }
}

fn has(code: &str, start: &str) -> bool {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word.starts_with(start))
}

/// The fragments of a kernel.
pub fn pieces(source: &Source) -> Vec<Piece> {
    // Kernels of two, four and eight rows have the same fragments.
    let rows = source.constants.iter().filter(|(name, _)| *name == "ROWS").map(|(_, value)| match value {
        Value::U32(2) => "two rows",
        Value::U32(4) => "four rows",
        Value::U32(_) | Value::F32(_) | Value::Bool(_) => "eight rows",
    });
    let fragments = source.fragments.iter().map(|fragment| fragment.path);
    fragments.chain(rows).map(|piece| (source.kernel(), piece)).collect()
}

/// The fewest layers, or nearly so, that run each piece of any which `run` has not.
fn cover(candidates: Vec<Known>, facts: &DeviceFacts, run: &mut BTreeSet<Piece>) -> Vec<Known> {
    let mut open = vec![];
    for known in candidates {
        let Ok(schedule) = known.schedule(facts) else { continue };
        let sources = known.operations(&schedule).map(|(_, operation)| operation.source());
        let pieces: BTreeSet<Piece> = sources.flat_map(|source| pieces(&source)).collect();
        open.push((known, pieces));
    }
    let mut layers = vec![];
    loop {
        open.retain_mut(|(_, pieces)| {
            pieces.retain(|piece| !run.contains(piece));
            !pieces.is_empty()
        });
        // The first of the best: `max_by_key` takes the last.
        let Some((known, pieces)) = open.iter().rev().max_by_key(|(_, pieces)| pieces.len()) else { return layers };
        layers.push(known.clone());
        run.extend(pieces);
    }
}

/// As the library plans it, and with all other choices.
const OPTIONS: [Options; 4] = [
    Options::AUTO,
    Options { fuse_quantization: false, diagnostics: true, ..Options::AUTO },
    // The layers are too small to have tiles of themselves.
    Options { cuts: Cuts::only(Cut::Tiles), ..Options::AUTO },
    Options { cuts: Cuts::only(Cut::FullTiles), fuse_quantization: false, ..Options::AUTO },
];

/// Both specs of every witness.
fn candidates() -> Vec<Known> {
    let mut specs = vec![];
    for witness in witnesses::witnesses() {
        specs.extend([(witness.field.clone(), witness.spec), (witness.field, witness.neutral)]);
    }
    // What two fields of one format, or of one quantisation, make together.
    let base = sample::deepseek_like;
    let (scale, code, span) = (ScaleFormat::Bf16, ActivationCode::E4m3, ScaleSpan::Tensor);
    let mut zeros = base();
    zeros.experts.format = WeightFormat::Int4 { group: Some(32), scale, zero_points: true, act_order: false };
    specs.push(("experts.format.Int4.zero_points".into(), zeros));
    // Blocks as wide as matrix units take them.
    let mut blocks = base();
    (blocks.hidden_size, blocks.experts.intermediate_size) = (256, 256);
    blocks.experts.format = WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 };
    blocks.experts.activation_quant = ActivationQuant::dynamic_fp8(128, ActivationScale::F32);
    // As engines compute them.
    let mut rounded = blocks.clone();
    rounded.precision = Precision::float32(FloatType::Bf16, FloatType::Bf16);
    (rounded.precision.model, rounded.precision.activation) = (FloatType::Bf16, ActivationRounding::Fused);
    (rounded.precision.combine, rounded.precision.block_scale) = (CombineRounding::WeightedRows, BlockScale::Promoted);
    specs.push(("experts.format.Fp8Block of 128 columns".into(), blocks));
    specs.push(("precision.block_scale.Promoted".into(), rounded));
    let mut tensor = base();
    let (rule, scale) = (ScaleRule::FlooredAmaxTimesReciprocal, ActivationScale::F32);
    tensor.experts.activation_quant = ActivationQuant::Dynamic { code, span, rule, scale };
    specs.push(("experts.activation_quant.Dynamic.span.Tensor".into(), tensor));
    // Rows of codes in whole vectors.
    let pairs = [(WeightFormat::Fp8Channel, ActivationCode::E4m3), (WeightFormat::Int8Channel, ActivationCode::Int8)];
    for (format, code) in pairs {
        let mut whole = base();
        whole.hidden_size = 64;
        whole.experts.format = format;
        let (span, rule, scale) = (ScaleSpan::Token, ScaleRule::FlooredAmaxTimesReciprocal, ActivationScale::F32);
        whole.experts.activation_quant = ActivationQuant::Dynamic { code, span, rule, scale };
        specs.push(("hidden_size of whole vectors".into(), whole));
    }
    let with = |(field, spec): &(String, MoeSpec)| {
        OPTIONS.map(|options| Known { field: field.clone(), spec: spec.clone(), options })
    };
    specs.iter().flat_map(with).collect()
}

/// Layers with what witnesses change elsewhere: activations, quantisation, roundings and types, and where weights act.
fn grafted(layers: &[Known]) -> Vec<Known> {
    let (mut activations, mut quants, mut precisions, mut positions) = (vec![], vec![], vec![], vec![]);
    for witness in witnesses::witnesses() {
        for spec in [witness.spec, witness.neutral] {
            add(&mut activations, spec.experts.activation);
            add(&mut quants, spec.experts.activation_quant);
            add(&mut precisions, spec.precision);
            add(&mut positions, spec.routing.weight_position);
        }
    }
    let mut grafted = vec![];
    for known in layers {
        let mut with = |change: &dyn Fn(&mut MoeSpec)| {
            let mut spec = known.spec.clone();
            change(&mut spec);
            grafted.extend(OPTIONS.map(|options| Known { field: known.field.clone(), spec: spec.clone(), options }));
        };
        activations.iter().for_each(|activation| with(&|spec| spec.experts.activation = *activation));
        quants.iter().for_each(|quant| with(&|spec| spec.experts.activation_quant = *quant));
        precisions.iter().for_each(|precision| with(&|spec| spec.precision = *precision));
        positions.iter().for_each(|position| with(&|spec| spec.routing.weight_position = *position));
    }
    grafted
}

fn add<T: PartialEq>(values: &mut Vec<T>, value: T) {
    if !values.contains(&value) {
        values.push(value);
    }
}

/// What a kernel came to in all that ran it.
#[derive(Debug, Clone, PartialEq)]
pub struct Kernel {
    /// Stage and variant.
    pub kernel: &'static str,
    /// Distinct texts of it that ran: sets of fragments and constants.
    pub texts: usize,
    /// Steps that ran it.
    pub runs: usize,
    /// Of the run that is nearest to its tolerance.
    pub error: f64,
    /// Likewise.
    pub tolerance: f64,
    /// What is wrong, in the first run where something is.
    pub complaint: Option<String>,
}

/// What all layers came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Answers {
    /// By name.
    pub kernels: Vec<Kernel>,
    /// How many layers there are.
    pub layers: usize,
    /// rel_fro of the output, of the call that is nearest to its tolerance.
    pub error: f64,
    /// Likewise.
    pub tolerance: f64,
    /// That call.
    pub worst: String,
    /// Layers that are wrong as a whole, or could not run.
    pub complaints: Vec<String>,
}

impl Answers {
    /// Whether all of it is right.
    pub fn right(&self) -> bool {
        self.complaints.is_empty() && self.kernels.iter().all(|kernel| kernel.complaint.is_none())
    }
}

/// Asks a device. `progress` hears how many layers of how many are done.
pub fn ask<B: Host + Clone + Sync>(
    backend: &B,
    catalogue: &Catalogue,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Answers {
    let mut answers = Answers {
        kernels: vec![],
        layers: catalogue.layers.len(),
        error: 0.0,
        tolerance: 0.0,
        worst: String::new(),
        complaints: vec![],
    };
    let mut kernels: BTreeMap<&'static str, Kernel> = BTreeMap::new();
    for source in catalogue.kernels.values() {
        let kernel = source.kernel();
        let new = Kernel { kernel, texts: 0, runs: 0, error: 0.0, tolerance: 0.0, complaint: None };
        kernels.entry(kernel).or_insert(new).texts += 1;
    }
    for (known, answer) in catalogue
        .layers
        .iter()
        .zip(spread(catalogue.layers.len(), progress, &|at| Answer::of(backend, &catalogue.layers[at])))
    {
        let Answer { steps, calls, failure } = answer;
        for Compared { step, kernel: name, error, tolerance, complaint } in steps {
            let Some(kernel) = kernels.get_mut(name) else { continue };
            kernel.runs += 1;
            if further((error, tolerance), (kernel.error, kernel.tolerance)) {
                (kernel.error, kernel.tolerance) = (error, tolerance);
            }
            let told = complaint.map(|complaint| format!("step {step} of {}: {complaint}", known.field));
            kernel.complaint = kernel.complaint.take().or(told);
        }
        for (tokens, off, tolerance) in calls {
            if further((off, tolerance), (answers.error, answers.tolerance)) {
                (answers.error, answers.tolerance) = (off, tolerance);
                answers.worst = format!("{}, hidden_size {}, {tokens} tokens", known.field, known.spec.hidden_size);
            }
            if off.is_nan() || off > tolerance {
                let told = format!("{}, {tokens} tokens: off by {off:.1e} of {tolerance:.1e}", known.field);
                answers.complaints.push(told);
            }
        }
        answers.complaints.extend(failure.map(|failure| format!("{}: {failure}", known.field)));
    }
    answers.kernels = kernels.into_values().collect();
    answers
}

/// Whether the first (error, tolerance) is the worse one.
fn further(a: (f64, f64), b: (f64, f64)) -> bool {
    let share = |(error, tolerance): (f64, f64)| if error == 0.0 { 0.0 } else { error / tolerance };
    let (a_share, b_share) = (share(a), share(b));
    // Of two that are exact the one with a tolerance says more.
    a_share.is_nan() || a_share > b_share || a_share == b_share && a.1 > b.1
}

/// What a layer came to.
#[derive(Default)]
struct Answer {
    steps: Vec<Compared>,
    /// Tokens, distance from the reference, tolerance.
    calls: Vec<(usize, f64, f64)>,
    failure: Option<String>,
}

impl Answer {
    fn of<B: Host + Clone>(backend: &B, known: &Known) -> Self {
        let mut answer = Self::default();
        answer.failure = answer.fill(backend, known).err().map(|error| error.to_string());
        answer
    }

    fn fill<B: Host + Clone>(&mut self, backend: &B, known: &Known) -> Result<()> {
        let facts = backend.facts();
        let schedule = known.schedule(&facts)?;
        let mut compiled = true;
        for (step, operation) in known.operations(&schedule) {
            if let Err(error) = backend.compile(step, operation) {
                compiled = false;
                let kernel = operation.source().kernel();
                let (step, complaint) = (step.to_owned(), Some(error.to_string()));
                self.steps.push(Compared { step, kernel, error: f64::INFINITY, tolerance: 0.0, complaint });
            }
        }
        if !compiled {
            return Ok(());
        }
        let mut layer = RandomLayer::new(known.spec.clone(), WEIGHTS)?;
        layer.soften_bias();
        let weights = layer.weights()?;
        let twin = Plan::new(Cpu::like(facts), &known.spec, &weights, MAX_TOKENS, &known.options)?;
        let device = Plan::new(backend.clone(), &known.spec, &weights, MAX_TOKENS, &known.options)?;
        let (twin, device) = (Session::new(twin, &known.spec)?, Session::new(device, &known.spec)?);
        let bound = SLACK * tolerance(&known.spec);
        for tokens in known.calls(&schedule) {
            let inputs = layer.inputs(tokens, INPUTS);
            let outcome = device.run(&inputs.view())?;
            let off = off(&layer, &inputs, outcome)?;
            self.calls.push((layer.tokens(tokens), off, bound));
            if facts.backend == Cpu::new().facts().backend {
                // It is the twins: the reference alone can judge it.
                let steps = device.bound().steps(layer.tokens(tokens));
                self.steps.extend(steps.iter().map(|step| Compared {
                    step: step.name.clone(),
                    kernel: step.operation.source().kernel(),
                    error: off,
                    tolerance: bound,
                    complaint: None,
                }));
            } else {
                self.steps.extend(lockstep::walk(&device, &twin, &known.spec, &inputs.view())?);
            }
        }
        Ok(())
    }
}

/// How far a call is from the reference.
fn off(layer: &RandomLayer, inputs: &LayerInputs, outcome: Outcome) -> Result<f64> {
    let (spec, weights) = (&layer.spec, layer.weights()?);
    let reference::Layer { routed, output } = reference::layer(spec, &weights, inputs.view())?;
    let Outcome { topk_ids, topk_weights, shared_weights, router_states, output: found } = outcome;
    if spec.entry.is_batched() {
        return Ok(distance(&vec![("output", output)], &vec![("output", found)]));
    }
    // Where two keys are as near as rounding errors a device may choose the other expert, as its twin does. Few tokens
    // have such keys; their experts are judged on what was chosen.
    const NEAR_TIES: usize = 50;
    let rows = |ids: &[i32]| ids.chunks(spec.top_k).map(<[i32]>::to_vec).collect::<Vec<_>>();
    let (wanted, chosen) = (rows(&routed.topk_ids), rows(&topk_ids));
    let others = wanted.iter().zip(&chosen).filter(|(wanted, chosen)| wanted != chosen).count();
    if others == 0 {
        let observed = |output, weights, shares, states| -> Observed {
            vec![("output", output), ("topk_weights", weights), ("shared_weights", shares), ("router_states", states)]
        };
        let wanted = observed(output, routed.topk_weights, routed.shared_weights, routed.router_states);
        return Ok(distance(&wanted, &observed(found, topk_weights, shared_weights, router_states)));
    }
    if others * NEAR_TIES > wanted.len().max(NEAR_TIES) {
        return Ok(f64::INFINITY);
    }
    let routed = Routed { topk_ids, topk_weights, shared_weights, ..routed };
    let output = reference::experts(spec, &weights, inputs.view(), &routed)?;
    Ok(distance(&vec![("output", output)], &vec![("output", found)]))
}
