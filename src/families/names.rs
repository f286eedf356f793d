//! Names of tensors, as data, and where in a checkpoint they are.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::spec::{GateUpLayout, Orientation};

/// Names of a layer's tensors: `PREFIX layers.N. MODULE . NAME`.
#[derive(Debug)]
pub(super) struct Names {
    /// The block that holds router and experts.
    pub(super) module: &'static str,
    /// The router; its matrix is `ROUTER.weight`.
    pub(super) router: &'static str,
    /// Bias inside the logits.
    pub(super) router_bias: Option<&'static str>,
    /// Bias for selection only.
    pub(super) selection_bias: Option<&'static str>,
    /// Experts of each token id.
    pub(super) tid2eid: Option<&'static str>,
    /// gate, up and down in `experts.I.NAME.weight` and in the shared expert, if the family has that layout.
    pub(super) projections: Option<[&'static str; 3]>,
    /// Last component of a block scale's name, in the place of `weight`.
    pub(super) scale: &'static str,
    /// The shared expert.
    pub(super) shared: Option<&'static str>,
    /// `experts.gate_up_proj` and `experts.down_proj`.
    pub(super) stacked: Stacked,
}

/// Layout of experts that are stacked in two tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stacked {
    pub(super) layout: GateUpLayout,
    pub(super) orientation: Orientation,
    /// Whether `_bias` tensors stand beside them.
    pub(super) biases: bool,
}

impl Stacked {
    /// transformers' own: [E, 2 I, H] with the gate rows first, and [E, H, I].
    pub(super) const HALVES: Self =
        Self { layout: GateUpLayout::Halves, orientation: Orientation::OutIn, biases: false };
}

/// A module of a layer: what its names begin with, and the names.
pub(super) type Site = (String, &'static Names);

/// The modules that are present, by layer. Parts of multi-token prediction are not layers.
pub(super) fn sites(checkpoint: &Checkpoint, modules: &'static [Names]) -> BTreeMap<usize, Vec<Site>> {
    let mut found: BTreeMap<usize, Vec<Site>> = BTreeMap::new();
    for name in checkpoint.names() {
        for (at, word) in name.match_indices("layers.") {
            let (before, after) = (name.get(..at).unwrap_or(""), name.get(at + word.len()..).unwrap_or(""));
            let starts_component = before.is_empty() || before.ends_with('.');
            let Some((number, rest)) = after.split_once('.') else { continue };
            let Some(layer) = layer_number(number) else { continue };
            if !starts_component || before.split('.').any(|part| part.starts_with("mtp")) {
                continue;
            }
            for names in modules {
                let Some(part) = rest.strip_prefix(names.module).and_then(|rest| rest.strip_prefix('.')) else {
                    continue;
                };
                // Other parts of a model, such as vision towers, have modules of this name too.
                let first = part.split('.').next().unwrap_or("");
                if first != names.router && first != "experts" {
                    continue;
                }
                let prefix = format!("{before}layers.{number}.{}.", names.module);
                let sites = found.entry(layer).or_default();
                if !sites.iter().any(|(known, _)| *known == prefix) {
                    sites.push((prefix, names));
                }
            }
        }
    }
    found
}

fn layer_number(digits: &str) -> Option<usize> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}
