//! Names of tensors, as data, and where in a checkpoint they are.
//!
//! One name often has several spellings: the authors', the hub's, and that of transformers' modules in memory,
//! which its re-saves have. A family lists them all; the first that a checkpoint has is taken, and a second one
//! beside it is a tensor without a use, which the loader refuses.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::spec::{GateUpLayout, Orientation};

/// Spellings of one name.
pub(super) type Spellings = &'static [&'static str];

/// Names of a layer's tensors: `PREFIX layers.N. MODULE . NAME`.
#[derive(Debug)]
pub(super) struct Names {
    /// What stands before the number of a layer.
    pub(super) layers: &'static str,
    /// The block that holds router and experts; empty if they stand in the layer itself.
    pub(super) modules: Spellings,
    /// Where the block is the layer itself: what the names of its parts begin with.
    pub(super) parts: Spellings,
    /// Modules that stand beside the block and belong to it. Names that begin with one of them are relative to
    /// the layer.
    pub(super) beside: Spellings,
    /// The router; its matrix is `ROUTER.weight`.
    pub(super) router: Spellings,
    /// Bias inside the logits.
    pub(super) router_bias: Spellings,
    /// Bias for selection only.
    pub(super) selection_bias: Spellings,
    /// Experts of each token id.
    pub(super) tid2eid: Spellings,
    /// What the router multiplies its normed input with.
    pub(super) input_scale: Spellings,
    /// Factors on the routing weights.
    pub(super) per_expert_scale: Spellings,
    /// Factor on all weights of joint normalisation.
    pub(super) global_scale: Spellings,
    /// Parts of a router that is an MLP, under the router.
    pub(super) router_mlp: Option<RouterMlpNames>,
    /// The routed experts.
    pub(super) experts: &'static [Mlp],
    /// The shared experts.
    pub(super) shared: &'static [Mlp],
    /// Row of the shared expert's gate.
    pub(super) shared_gate: Spellings,
    /// Projections and norms around the routed experts.
    pub(super) latent: Option<LatentNames>,
    /// Bias on the routed sum.
    pub(super) output_bias: Spellings,
    /// Weight of the norm on the output.
    pub(super) output_norm: Spellings,
}

/// A layer with the names that most families have: of DeepSeek-V3, Qwen, GLM and their kin.
pub(super) const MLP: Names = Names {
    layers: "layers",
    modules: &["mlp"],
    parts: &[],
    beside: &[],
    router: &["gate"],
    router_bias: &[],
    selection_bias: &["gate.e_score_correction_bias"],
    tid2eid: &[],
    input_scale: &[],
    per_expert_scale: &[],
    global_scale: &[],
    router_mlp: None,
    experts: &[FUSED, PROJ],
    shared: &[SHARED_EXPERTS],
    shared_gate: &[],
    latent: None,
    output_bias: &[],
    output_norm: &[],
};

/// One MLP, or the routed experts: a module and how its matrices are stored.
#[derive(Debug)]
pub(super) struct Mlp {
    /// Empty if the tensors stand in the block itself.
    pub(super) module: &'static str,
    pub(super) layout: Layout,
}

/// How the matrices of one or many MLPs are stored.
#[derive(Debug)]
pub(super) enum Layout {
    /// A tensor each: `MODULE.I.PART.weight`, for a single MLP `MODULE.PART.weight`.
    Each(Parts),
    /// Gate and up in one tensor, [2 I, H] or [H, 2 I], of all experts [E, 2 I, H] or [E, H, 2 I].
    Fused {
        gate_up: &'static str,
        down: &'static str,
        rows: GateUpLayout,
        /// `None`: the shapes say it.
        orientation: Option<Orientation>,
    },
    /// A tensor for each matrix of all experts: [E, I, H] and [E, H, I].
    Stacked(Parts),
    /// A tensor for each matrix of all experts, without a dimension for the expert: all [E I, H] (DBRX).
    Flat(Parts),
}

impl Layout {
    /// For the table of what is supported.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Each(_) => "per expert",
            Self::Fused {
                gate_up: _,
                down: _,
                rows: GateUpLayout::Separate | GateUpLayout::Halves,
                orientation: _,
            } => "fused",
            Self::Fused { gate_up: _, down: _, rows: GateUpLayout::Interleaved, orientation: _ } => {
                "fused, interleaved"
            }
            Self::Stacked(_) => "stacked",
            Self::Flat(_) => "flat",
        }
    }
}

/// Names of an expert's matrices; no gate where the activation has none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    pub(super) gate: Option<&'static str>,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
}

const fn parts(gate: &'static str, up: &'static str, down: &'static str) -> Parts {
    Parts { gate: Some(gate), up, down }
}

/// transformers' own layout: [E, 2 I, H] with the gate rows first, and [E, H, I].
pub(super) const FUSED: Mlp = fused("experts", "gate_up_proj", "down_proj", GateUpLayout::Halves);
/// `experts.I.gate_proj.weight` and so on.
pub(super) const PROJ: Mlp = proj("experts");
/// `experts.I.w1.weight` (gate), `w3` (up) and `w2` (down).
pub(super) const SHORT: Mlp = short("experts");
/// `shared_experts.gate_proj.weight` and so on.
pub(super) const SHARED_EXPERTS: Mlp = proj("shared_experts");
/// `shared_expert.gate_proj.weight` and so on.
pub(super) const SHARED_EXPERT: Mlp = proj("shared_expert");

/// `MODULE.gate_proj.weight` and so on.
pub(super) const fn proj(module: &'static str) -> Mlp {
    named(module, "gate_proj", "up_proj", "down_proj")
}

/// `MODULE.w1.weight` (gate), `w3` (up) and `w2` (down).
pub(super) const fn short(module: &'static str) -> Mlp {
    named(module, "w1", "w3", "w2")
}

/// `MODULE.GATE.weight` and so on.
pub(super) const fn named(module: &'static str, gate: &'static str, up: &'static str, down: &'static str) -> Mlp {
    Mlp { module, layout: Layout::Each(parts(gate, up, down)) }
}

/// Two tensors, whose orientation their shapes say.
pub(super) const fn fused(module: &'static str, gate_up: &'static str, down: &'static str, rows: GateUpLayout) -> Mlp {
    Mlp { module, layout: Layout::Fused { gate_up, down, rows, orientation: None } }
}

/// Three tensors [E, out, in].
pub(super) const fn stacked(module: &'static str, gate: &'static str, up: &'static str, down: &'static str) -> Mlp {
    Mlp { module, layout: Layout::Stacked(parts(gate, up, down)) }
}

/// Three tensors [E I, H].
pub(super) const fn flat(module: &'static str, gate: &'static str, up: &'static str, down: &'static str) -> Mlp {
    Mlp { module, layout: Layout::Flat(parts(gate, up, down)) }
}

/// Parts of a router that is an MLP; linear layers are without `.weight` and `.bias`.
#[derive(Debug, Clone, Copy)]
pub(super) struct RouterMlpNames {
    pub(super) down: &'static str,
    pub(super) states_scale: &'static str,
    pub(super) norm: &'static str,
    pub(super) fc1: &'static str,
    pub(super) fc2: &'static str,
    pub(super) out: &'static str,
}

/// Projections and norms around the routed experts; the projections are without `.weight`.
#[derive(Debug, Clone, Copy)]
pub(super) struct LatentNames {
    pub(super) down: &'static str,
    pub(super) up: &'static str,
    /// Of the norm on the reduced sum, or of the first of two.
    pub(super) norm: &'static str,
    /// Of the norm behind each expert.
    pub(super) post_norm: &'static str,
    /// Norm weights are stored less 1.
    pub(super) zero_centred: bool,
}

/// A block of a layer that is present, and how its names begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Site {
    /// What names beside the block begin with: `PREFIX layers.N.`, or nothing.
    pub(super) layer: String,
    /// Which of [`Names::modules`].
    pub(super) module: &'static str,
}

impl Site {
    /// The full name of a tensor of the block.
    pub(super) fn name(&self, names: &Names, part: &str) -> String {
        let first = part.split('.').next().unwrap_or("");
        match self.module.is_empty() || names.beside.contains(&first) {
            true => format!("{}{part}", self.layer),
            false => format!("{}{}.{part}", self.layer, self.module),
        }
    }

    /// What the names of all tensors that belong to the block begin with.
    pub(super) fn owned(&self, names: &Names) -> Vec<String> {
        let block = if self.module.is_empty() { names.parts } else { std::slice::from_ref(&self.module) };
        block.iter().chain(names.beside).map(|part| format!("{}{part}.", self.layer)).collect()
    }
}

/// Whether a checkpoint has the factors on the state of the layer before.
pub(super) fn has_states_scale(checkpoint: &Checkpoint, names: &Names) -> bool {
    let wanted = names.router_mlp.as_ref().and_then(|mlp| mlp.states_scale.rsplit('.').next());
    wanted.is_some_and(|wanted| checkpoint.names().any(|name| name.rsplit('.').next() == Some(wanted)))
}

/// The blocks that are present, by layer. Parts of multi-token prediction are not layers.
pub(super) fn sites(checkpoint: &Checkpoint, names: &Names) -> BTreeMap<usize, Vec<Site>> {
    let mut found: BTreeMap<usize, Vec<Site>> = BTreeMap::new();
    let word = format!("{}.", names.layers);
    // Other parts of a model, such as vision towers and dense layers, have modules of this name too: only a
    // router or experts make it a block.
    let first = |part: &'static str| part.split('.').next().unwrap_or("");
    let mut marks: Vec<&str> = names.router.iter().copied().map(first).collect();
    marks.push("experts");
    for name in checkpoint.names() {
        for (at, _) in name.match_indices(&word) {
            let (before, after) = (name.get(..at).unwrap_or(""), name.get(at + word.len()..).unwrap_or(""));
            let starts_component = before.is_empty() || before.ends_with('.');
            let Some((number, rest)) = after.split_once('.') else { continue };
            let Some(layer) = layer_number(number) else { continue };
            if !starts_component || before.split('.').any(|part| part.starts_with("mtp")) {
                continue;
            }
            for &module in names.modules {
                let part = match module.is_empty() {
                    true => Some(rest),
                    false => rest.strip_prefix(module).and_then(|rest| rest.strip_prefix('.')),
                };
                let Some(part) = part else { continue };
                if !marks.contains(&part.split('.').next().unwrap_or("")) {
                    continue;
                }
                let site = Site { layer: format!("{before}{word}{number}."), module };
                let sites = found.entry(layer).or_default();
                if !sites.contains(&site) {
                    sites.push(site);
                }
            }
        }
    }
    found
}

/// The tensors of each layer's block, whole or not, where the model's layers are: those of other parts of a model,
/// such as vision towers, are beside them.
pub(super) fn tensors(
    checkpoint: &Checkpoint,
    names: &Names,
    sites: &BTreeMap<usize, Vec<Site>>,
    layer: usize,
) -> Vec<String> {
    let own = sites.get(&layer).into_iter().flatten().flat_map(|site| site.owned(names));
    let mut prefixes: Vec<String> = own.collect();
    if prefixes.is_empty() {
        // What a layer with a router or experts would be called if it were this one.
        for (number, sites) in sites {
            let (other, this) = (format!("{}.{number}.", names.layers), format!("{}.{layer}.", names.layers));
            let moved = |site: &Site| Site { layer: site.layer.replace(&other, &this), module: site.module };
            prefixes.extend(sites.iter().flat_map(|site| moved(site).owned(names)));
        }
    }
    prefixes.sort_unstable();
    prefixes.dedup();
    let ours = |name: &&str| prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()));
    checkpoint.names().filter(ours).map(str::to_owned).collect()
}

fn layer_number(digits: &str) -> Option<usize> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}
