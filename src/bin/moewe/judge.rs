//! One golden case: every tensor of its file is an input, is judged, is exempt, or is named as not used yet.

use moewe::families::{self, Request, Resolved};
use moewe::host::Outcome;
use moewe::reference::Inputs;
use moewe::spec::{ActivationQuant, ActivationScale, ExpertInput, FloatType, Router, ZeroExpertKind, ZeroExperts};
use moewe::{Checkpoint, Error, MoeSpec, Result, Scope, Unsupported};

use crate::case_file::{Batch, CaseFile};
use crate::cases::Case;
use crate::engine::{Engine, Runner, Work};
use crate::inputs;
use crate::json::Status;
use crate::metrics;

/// Bound of an output's [`metrics::calc_diff`] where no manifest gives an absolute one.
const CALC_DIFF: f64 = 1e-5;
/// Bound of a weight's relative error where no manifest gives an absolute one.
const RELATIVE: f64 = 1e-5;

/// How the tolerances of the manifest are changed.
#[derive(Debug, Clone, Copy)]
pub struct Allowance {
    /// Multiplies those of weights and outputs.
    pub factor: f64,
    /// `--atol`: replaces those of outputs, factor included.
    pub atol: Option<f64>,
}

/// One comparison.
#[derive(Debug, Clone)]
pub struct Check {
    /// Name of the expected tensor.
    pub name: String,
    /// What was found.
    pub error: f64,
    /// What is allowed.
    pub tolerance: f64,
}

impl Check {
    /// error / tolerance. Any error beyond a tolerance of 0, and NaN, is infinitely bad.
    fn badness(&self) -> f64 {
        let Self { name: _, error, tolerance } = self;
        if *error == 0.0 {
            0.0
        } else if error.is_nan() || *tolerance == 0.0 {
            f64::INFINITY
        } else {
            error / tolerance
        }
    }

    fn holds(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// What came of a case.
#[derive(Debug, Default)]
pub struct Verdict {
    /// What ran.
    pub checks: Vec<Check>,
    /// Keys of its config that nobody knows.
    pub unknown_keys: Vec<String>,
    refused: Vec<String>,
    failed: Vec<String>,
}

impl Verdict {
    /// Of a case that cannot be looked at.
    pub fn unjudged(error: &Error) -> Self {
        let mut verdict = Self::default();
        verdict.note(error);
        verdict
    }

    /// Judges a case. Whatever stops it is a part of the verdict.
    pub fn of(case: &Case, kind: &str, file: Result<CaseFile>, engine: &dyn Engine, allowance: Allowance) -> Self {
        let mut verdict = Self::default();
        if let Err(error) = verdict.judge(case, kind, file, engine, allowance) {
            verdict.note(&error);
        }
        for check in verdict.checks.iter().filter(|check| !check.holds()) {
            let Check { name, error, tolerance } = check;
            verdict.failed.push(format!("{name}: error {error:.3e}, expected at most {tolerance:.3e}"));
        }
        verdict
    }

    /// The case as a whole.
    pub fn status(&self) -> Status {
        match (self.failed.is_empty(), self.refused.is_empty()) {
            (true, true) => Status::Pass,
            (true, false) => Status::Unsupported,
            (false, _) => Status::Fail,
        }
    }

    /// Why it did not pass.
    pub fn reason(&self) -> Option<String> {
        let reasons: Vec<&str> = self.failed.iter().chain(&self.refused).map(String::as_str).collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    /// The check with the largest error for its tolerance; the first of equals.
    pub fn worst(&self) -> Option<&Check> {
        // `max_by` gives the last of equals.
        self.checks.iter().rev().max_by(|a, b| a.badness().total_cmp(&b.badness()))
    }

    fn note(&mut self, error: &Error) {
        match Status::of(error) {
            Status::Unsupported => self.refused.push(error.to_string()),
            Status::Fail | Status::Pass => self.failed.push(error.to_string()),
        }
    }

    fn judge(
        &mut self,
        case: &Case,
        kind: &str,
        file: Result<CaseFile>,
        engine: &dyn Engine,
        allowance: Allowance,
    ) -> Result<()> {
        let scope = scope(kind)?;
        let file = file?;
        let batches = match scope {
            Scope::Layer => file.batches()?,
            Scope::Routing => vec![file.router_batch()?],
        };
        let unused = file.unused(&batches);
        if !unused.is_empty() {
            self.refused.push(format!("{} cannot be computed or used yet", unused.join(", ")));
        }
        let checkpoint = Checkpoint::open(&case.folder)?;
        let input = file.input_type(&batches)?;
        let tokens = batches.iter().map(|batch| batch.tokens).max().unwrap_or(0).max(1);
        let mut passed_routing = false;
        for profile in PROFILES {
            if !profile.names.iter().any(|name| file.any(&batches, name)) && (scope == Scope::Layer || passed_routing) {
                continue;
            }
            let request =
                Request { layer: case.layer()?, input, output: FloatType::F32, activations: profile.activations };
            let resolved = match scope {
                Scope::Layer => families::resolve(&checkpoint, &request)?,
                Scope::Routing => families::resolve_router(&checkpoint, &request)?,
            };
            self.unknown_keys = resolved.unknown_keys.clone();
            let (layer, router);
            let work = match scope {
                Scope::Layer => {
                    layer = resolved.weights(&checkpoint)?;
                    Work::Layer(&layer)
                }
                Scope::Routing => {
                    router = resolved.router_weights(&checkpoint)?;
                    Work::Routing(&router)
                }
            };
            let runner = engine.plan(&resolved.spec, work, tokens)?;
            let judged = Judged { case, file: &file, resolved: &resolved, scope, allowance, profile };
            if !passed_routing {
                self.refused.extend(judged.useless(&batches));
            }
            for batch in &batches {
                judged.batch(batch, runner.as_ref(), passed_routing, &mut self.checks)?;
            }
            passed_routing = true;
        }
        match passed_routing {
            true => Ok(()),
            false => file.present(&batches[0], &["output", "output_dequant"]).map(|_| ()),
        }
    }
}

/// What a case expects under one quantisation of activations.
#[derive(Debug, Clone, Copy)]
struct Profile {
    /// Its outputs, of which a batch has one.
    names: &'static [&'static str],
    activations: ActivationQuant,
}

/// golden/README.md: amax floored at 1e-10 and divided by 448, groups of 128; UE8M0 rounds that up.
const PROFILES: [Profile; 3] = [
    Profile { names: &["output", "output_dequant"], activations: ActivationQuant::None },
    Profile { names: &["output_w8a8"], activations: ActivationQuant::dynamic_fp8(128, ActivationScale::F32) },
    Profile {
        names: &["output_w8a8_ue8m0"],
        activations: ActivationQuant::dynamic_fp8(128, ActivationScale::F32CeilPow2),
    },
];

/// How much of a layer a kind of case is about.
fn scope(kind: &str) -> Result<Scope> {
    match kind {
        "float" | "fp8_block" | "mxfp4" | "fp4_e8m0" | "int4_compressed_tensors" | "nvfp4" | "quantised" => {
            Ok(Scope::Layer)
        }
        "routing" => Ok(Scope::Routing),
        unknown => Err(Error::Unsupported(Unsupported {
            backend: "moewe verify".into(),
            field: "kind".into(),
            value: unknown.to_owned(),
            because: "no such kind of case is known".into(),
        })),
    }
}

/// A case that runs.
struct Judged<'a> {
    case: &'a Case,
    file: &'a CaseFile,
    resolved: &'a Resolved,
    scope: Scope,
    allowance: Allowance,
    profile: Profile,
}

/// Whether the router can choose an output that does nothing.
fn skips(spec: &MoeSpec) -> bool {
    match spec.routing.zero_experts {
        Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip }) => true,
        Some(ZeroExperts { count: _, kind: ZeroExpertKind::Identity }) | None => false,
    }
}

/// How two lists of numbers are compared.
#[derive(Debug, Clone, Copy)]
enum Bound {
    Absolute(f64),
    Relative(f64),
    CalcDiff(f64),
}

impl Bound {
    fn check(self, name: String, found: &[f32], expected: &[f32]) -> Check {
        let (error, tolerance) = match self {
            Self::Absolute(bound) => (metrics::absolute(found, expected), bound),
            Self::Relative(bound) => (metrics::relative(found, expected), bound),
            Self::CalcDiff(bound) => (metrics::calc_diff(found, expected), bound),
        };
        Check { name, error, tolerance }
    }
}

impl Judged<'_> {
    /// Inputs and expected results that this layer has no use for.
    fn useless(&self, batches: &[Batch]) -> Vec<String> {
        let spec = &self.resolved.spec;
        let separate = match spec.expert_input {
            ExpertInput::Hidden => false,
            ExpertInput::Separate => true,
        };
        let known = [
            ("expert_hidden_states", separate),
            ("router_states_in", self.state_enters()),
            ("router_states_out", inputs::state_size(&spec.router) > 0),
            ("shared_gammas", spec.joint_shares() > 0),
        ];
        let has = |batch: &Batch, name: &'static str| self.file.present(batch, &[name]).is_ok();
        let mut useless = vec![];
        for batch in batches {
            for (name, _) in known.iter().filter(|(name, used)| !used && has(batch, name)) {
                useless.push(format!("{} cannot be used: config.json gives the layer none", batch.named(name)));
            }
        }
        useless
    }

    fn state_enters(&self) -> bool {
        match self.resolved.spec.router {
            Router::Mlp { state_size: _, rms_norm_eps: _, previous_state, format: _ } => previous_state,
            Router::Linear { input: _, format: _, bias: _, transform: _ } | Router::Given { transform: _ } => false,
        }
    }

    fn batch(&self, batch: &Batch, runner: &dyn Runner, routing_known: bool, checks: &mut Vec<Check>) -> Result<()> {
        let (file, spec) = (self.file, &self.resolved.spec);
        let hidden_states = file.hidden_states(batch, spec.hidden_size)?;
        let token_ids = file.token_ids(batch)?;
        let state_size = inputs::state_size(&spec.router);
        let expert_hidden_states = file.optional_floats(batch, "expert_hidden_states", spec.hidden_size)?;
        let router_states = match state_size {
            0 => None,
            size => file.optional_floats(batch, "router_states_in", size)?,
        };
        // A router alone may be given without the state before it: as in the models' code, that adds nothing.
        let router_states = match (self.scope, router_states) {
            (Scope::Routing, None) if self.state_enters() => Some(vec![0.0; batch.tokens * state_size]),
            (Scope::Routing | Scope::Layer, states) => states,
        };
        let inputs = Inputs {
            token_ids: token_ids.as_deref(),
            expert_hidden_states: expert_hidden_states.as_deref(),
            router_states: router_states.as_deref(),
            ..Inputs::of(&hidden_states)
        };
        let Outcome { mut topk_ids, topk_weights, shared_weights, router_states, output } = runner.run(&inputs)?;
        self.outputs(batch, runner, &inputs, &output, checks)?;
        if routing_known {
            return Ok(());
        }
        let mut expected_ids = file.ids(batch, "topk_ids", spec.top_k)?;
        if skips(spec) {
            // A router that skips may say so with an id of no expert, or with expert 0 and weight 0.
            for id in topk_ids.iter_mut().chain(&mut expected_ids) {
                if usize::try_from(*id).is_ok_and(|id| id >= spec.num_experts) {
                    *id = 0;
                }
            }
        }
        if spec.joint_shares() > 0
            && let Some(expected) = file.optional_floats(batch, "shared_gammas", spec.joint_shares())?
        {
            checks.push(self.weight_bound()?.check(batch.named("shared_gammas"), &shared_weights, &expected));
        }
        if state_size > 0
            && let Some(expected) = file.optional_floats(batch, "router_states_out", state_size)?
        {
            let bound = self.state_bound(&expected);
            checks.push(bound.check(batch.named("router_states_out"), &router_states, &expected));
        }

        let (found_ids, found_weights) = metrics::sort_slots(&topk_ids, &topk_weights, spec.top_k);
        let expected_weights = file.floats(batch, "topk_weights", spec.top_k)?;
        let (ids, weights) = metrics::sort_slots(&expected_ids, &expected_weights, spec.top_k);
        let error = metrics::differing(&found_ids, &ids) as f64;
        checks.push(Check { name: batch.named("topk_ids"), error, tolerance: 0.0 });
        checks.push(self.weight_bound()?.check(batch.named("topk_weights"), &found_weights, &weights));
        Ok(())
    }

    /// What the experts made of it, and what they read as codes.
    fn outputs(
        &self,
        batch: &Batch,
        runner: &dyn Runner,
        inputs: &Inputs<'_>,
        output: &[f32],
        checks: &mut Vec<Check>,
    ) -> Result<()> {
        let (file, width) = (self.file, self.resolved.spec.hidden_size);
        match self.scope {
            Scope::Routing => return Ok(()),
            Scope::Layer => {}
        }
        for name in file.present(batch, self.profile.names)? {
            let expected = file.floats(batch, name, width)?;
            let suffix = name.strip_prefix("output").unwrap_or("");
            let marks = file.optional_bytes(batch, &format!("flip_sensitive{suffix}"), 1)?;
            let sensitive = |token: usize| marks.as_ref().is_some_and(|marks| marks[token] != 0);
            for (flips, title) in [(false, ""), (true, " (flip-sensitive tokens)")] {
                let rows: Vec<usize> = (0..batch.tokens).filter(|&token| sensitive(token) == flips).collect();
                let of = |values: &[f32]| -> Vec<f32> {
                    rows.iter().flat_map(|row| &values[row * width..(row + 1) * width]).copied().collect()
                };
                if !rows.is_empty() {
                    let bound = self.output_bound(name, flips)?;
                    checks.push(bound.check(format!("{}{title}", batch.named(name)), &of(output), &of(&expected)));
                }
            }
            let [codes_name, scales_name] = ["input_codes", "input_scales"].map(|stem| format!("{stem}{suffix}"));
            let expected_codes = file.optional_bytes(batch, &codes_name, width)?;
            let expected_scales = file.optional_rows(batch, &scales_name)?;
            if expected_codes.is_none() && expected_scales.is_none() {
                continue;
            }
            let (codes, scales) = runner.input_codes(inputs)?;
            let mut exact = |name: &str, found: &[i32], expected: &[i32]| {
                let error = metrics::differing(found, expected) as f64;
                checks.push(Check { name: batch.named(name), error, tolerance: 0.0 });
            };
            if let Some(expected) = expected_codes {
                let integers = |codes: &[u8]| -> Vec<i32> { codes.iter().map(|code| i32::from(*code)).collect() };
                exact(&codes_name, &integers(&codes), &integers(&expected));
            }
            if let Some(expected) = expected_scales {
                let bits = |scales: &[f32]| -> Vec<i32> { scales.iter().map(|scale| scale.to_bits() as i32).collect() };
                exact(&scales_name, &bits(&scales), &bits(&expected));
            }
        }
        Ok(())
    }

    fn weight_bound(&self) -> Result<Bound> {
        let factor = self.allowance.factor;
        let absolute = self.case.weight_tolerance()?;
        Ok(absolute.map_or(Bound::Relative(factor * RELATIVE), |bound| Bound::Absolute(factor * bound)))
    }

    /// A state is a sum of products as large as itself, not a weight: some 80 f32 ulp of its root mean square.
    fn state_bound(&self, expected: &[f32]) -> Bound {
        let square: f64 = expected.iter().map(|&value| f64::from(value).powi(2)).sum();
        let rms = (square / expected.len().max(1) as f64).sqrt();
        Bound::Absolute(self.allowance.factor * RELATIVE * rms)
    }

    fn output_bound(&self, name: &str, flips: bool) -> Result<Bound> {
        let Allowance { factor, atol } = self.allowance;
        if let Some(atol) = atol {
            return Ok(Bound::Absolute(atol));
        }
        // The manifest's object calls `output_dequant` by its last word.
        let absolute = match flips {
            true => self.case.flip_tolerance()?,
            false => self.case.output_tolerance(name.strip_prefix("output_").unwrap_or(name))?,
        };
        Ok(absolute.map_or(Bound::CalcDiff(factor * CALC_DIFF), |bound| Bound::Absolute(factor * bound)))
    }
}
