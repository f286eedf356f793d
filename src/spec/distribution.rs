//! What of a layer this device holds, and how rows enter it.
//!
//! The outputs of devices that hold parts of one layer add up to the layer's output: each expert on one device (or
//! each column of its inner width), and what a sum has once on one of them.

use super::validate::width;
use super::{
    ExpertInput, Latent, LatentNorm, LogitTransform, MoeSpec, Router, RouterInput, SharedExperts, ZeroExperts,
};
use crate::error::{Error, Result};

/// Which experts this device holds. An expert that is elsewhere contributes 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// All: slot e is expert e.
    All,
    /// `first .. first + count`: slot s is expert `first + s`.
    Range {
        /// First expert here.
        first: usize,
        /// How many.
        count: usize,
    },
    /// A table. An expert with several slots has equal weights in each, of which a token takes one by the hash of
    /// its index in the call.
    Map {
        /// Slots here: matrices of [`MoeWeights::experts`](crate::MoeWeights).
        num_slots: usize,
        /// Entries of an expert. One with fewer slots repeats them.
        replicas: usize,
        /// `slots[e * replicas + r]`: a slot, -1 where expert e is elsewhere, or -2 where it should be here and is
        /// not: tokens that choose it get NaN, and are counted in `expert_misses`.
        slots: Vec<i32>,
    },
}

/// Where a [`Placement`] finds an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Here.
    Here(usize),
    /// On another device: contributes 0.
    Elsewhere,
    /// Nowhere: the token's row is NaN.
    Missing,
}

impl Placement {
    /// Slots of this device.
    pub fn num_slots(&self, num_experts: usize) -> usize {
        match self {
            Self::All => num_experts,
            Self::Range { first: _, count } => *count,
            Self::Map { num_slots, replicas: _, slots: _ } => *num_slots,
        }
    }

    /// The slot in which `token` finds the routed expert `id`.
    pub fn slot(&self, id: usize, token: usize) -> Slot {
        match self {
            Self::All => Slot::Here(id),
            Self::Range { first, count } => match id.checked_sub(*first) {
                Some(slot) if slot < *count => Slot::Here(slot),
                Some(_) | None => Slot::Elsewhere,
            },
            Self::Map { num_slots, replicas, slots } => {
                let replica = replica(token, *replicas);
                match slots.get(id * replicas + replica).map(|&slot| (slot, usize::try_from(slot))) {
                    Some((_, Ok(slot))) if slot < *num_slots => Slot::Here(slot),
                    Some((-1, _)) => Slot::Elsewhere,
                    Some(_) | None => Slot::Missing,
                }
            }
        }
    }

    /// The expert in each slot.
    pub fn experts(&self, num_experts: usize) -> Vec<Option<usize>> {
        match self {
            Self::All => (0..num_experts).map(Some).collect(),
            Self::Range { first, count } => (*first..first + count).map(Some).collect(),
            Self::Map { num_slots, replicas, slots } => {
                let mut experts = vec![None; *num_slots];
                for (entry, slot) in slots.iter().enumerate() {
                    if let Some(expert) = usize::try_from(*slot).ok().and_then(|slot| experts.get_mut(slot)) {
                        *expert = Some(entry / replicas);
                    }
                }
                experts
            }
        }
    }

    /// Whether experts may be elsewhere.
    pub fn is_partial(&self) -> bool {
        match self {
            Self::All => false,
            Self::Range { first: _, count: _ } | Self::Map { num_slots: _, replicas: _, slots: _ } => true,
        }
    }
}

/// Which replica a token takes: Fibonacci hashing of its index. Twin: shaders/fragments/assigned_table.wgsl
pub(crate) fn replica(token: usize, replicas: usize) -> usize {
    let hash = (token as u32).wrapping_mul(0x9e37_79b9) >> 16;
    hash as usize % replicas
}

/// Which part of the routed experts' intermediate size this device holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorShard {
    /// All of it.
    Whole,
    /// Columns `first .. first + size`, which may begin and end inside a block of scales. Spans of quantised
    /// activations begin at `first`.
    Part {
        /// First column here.
        first: usize,
        /// How many.
        size: usize,
        /// Whether this shard adds the down bias.
        owns_down_bias: bool,
    },
}

impl TensorShard {
    /// (first column, columns) of `intermediate_size`.
    pub fn columns(&self, intermediate_size: usize) -> (usize, usize) {
        match self {
            Self::Whole => (0, intermediate_size),
            Self::Part { first, size, owns_down_bias: _ } => (*first, *size),
        }
    }

    /// Whether the down bias is added here.
    pub fn owns_down_bias(&self) -> bool {
        match self {
            Self::Whole => true,
            Self::Part { first: _, size: _, owns_down_bias } => *owns_down_bias,
        }
    }

    /// Whether columns may be elsewhere.
    pub fn is_partial(&self) -> bool {
        match self {
            Self::Whole => false,
            Self::Part { first: _, size: _, owns_down_bias: _ } => true,
        }
    }
}

/// Terms that a sum over devices has once: shared experts, zero experts and the output bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommonTerms {
    /// This device adds them.
    Here,
    /// Another one does: their weights are not given, zero experts contribute 0.
    Elsewhere,
}

/// How rows enter the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// [T, H], routed and permuted inside.
    TokenMajor,
    /// [slots, capacity, H] and the rows that each slot has; what lies behind a count is not read, and its output is
    /// 0. Rows leave as they enter, each its expert's output: routing and combining are the caller's, and of
    /// [`Routing`](super::Routing) only the position of the weights acts. A "token" is a row here.
    Batched {
        /// Rows per slot.
        capacity: usize,
    },
}

impl Entry {
    /// Whether this layer routes and combines.
    pub fn is_batched(&self) -> bool {
        match self {
            Self::TokenMajor => false,
            Self::Batched { capacity: _ } => true,
        }
    }
}

impl MoeSpec {
    /// Whether this device adds what a sum over devices has once.
    pub fn adds_common_terms(&self) -> bool {
        match self.common_terms {
            CommonTerms::Here => true,
            CommonTerms::Elsewhere => false,
        }
    }

    /// Slots of this device.
    pub fn num_slots(&self) -> usize {
        self.placement.num_slots(self.num_experts)
    }

    /// Rows that a token has in the experts: k, or 1 where rows enter routed.
    pub fn rows_per_token(&self) -> usize {
        match self.entry {
            Entry::TokenMajor => self.top_k,
            Entry::Batched { capacity: _ } => 1,
        }
    }

    /// Refuses a layer whose rows enter routed where its routing is asked for.
    pub(crate) fn expect_routing(&self) -> Result<()> {
        match self.entry {
            Entry::TokenMajor => Ok(()),
            Entry::Batched { capacity: _ } => Err(Error::invalid(
                "entry",
                format!("{:?}", self.entry),
                "TokenMajor",
                "plan the routing as a layer of its own: rows of this one enter routed",
            )),
        }
    }

    /// The rules of what this device holds.
    pub(super) fn validate_distribution(&self) -> Result<()> {
        self.validate_placement()?;
        let whole = self.experts.intermediate_size;
        let (first, size) = self.shard.columns(whole);
        if size == 0 || first.checked_add(size).is_none_or(|end| end > whole) {
            let expected = format!("a part of 0..{whole}");
            let remedy = "correct the shard of intermediate_size";
            return Err(Error::invalid("shard", format!("{first} + {size}"), expected, remedy));
        }
        let partial = self.placement.is_partial() || self.shard.is_partial();
        if !partial && !self.adds_common_terms() {
            return Err(Error::invalid(
                "common_terms",
                "Elsewhere",
                "Here, as the whole layer is",
                "correct it, or the placement or shard of this device",
            ));
        }
        // A norm of a part is no part of the norm.
        let norm = match &self.latent {
            Some(Latent { size: _, format: _, norm: LatentNorm::Reduced { eps: _ } }) if partial => Some("latent.norm"),
            Some(Latent { size: _, format: _, norm: LatentNorm::PreAndPost { pre_eps: _, post_eps: _ } })
                if self.shard.is_partial() =>
            {
                Some("latent.norm")
            }
            Some(Latent { size: _, format: _, norm: _ }) | None => {
                self.output_norm.filter(|_| partial).map(|_| "output_norm")
            }
        };
        if let Some(field) = norm {
            return Err(Error::invalid(
                field,
                "a norm of a sum of which other devices have a part",
                "none",
                "norm the sum over all devices, behind this layer",
            ));
        }
        self.validate_entry()
    }

    fn validate_placement(&self) -> Result<()> {
        let num_experts = self.num_experts;
        match &self.placement {
            Placement::All => Ok(()),
            Placement::Range { first, count } => {
                if *count > 0 && first.checked_add(*count).is_some_and(|end| end <= num_experts) {
                    return Ok(());
                }
                Err(Error::invalid(
                    "placement",
                    format!("{first} + {count}"),
                    format!("a range of at least one in 0..{num_experts}"),
                    "correct the expert range of this device",
                ))
            }
            Placement::Map { num_slots, replicas, slots } => {
                if *num_slots == 0 || *num_slots > super::MAX_ROUTER_OUTPUTS {
                    let expected = format!("1 to {}", super::MAX_ROUTER_OUTPUTS);
                    let remedy = "count the experts whose weights are here";
                    return Err(Error::invalid("placement.num_slots", num_slots, expected, remedy));
                }
                if *replicas == 0 || replicas.checked_mul(num_experts) != Some(slots.len()) {
                    return Err(Error::invalid(
                        "placement.slots",
                        format!("{} entries, {replicas} an expert", slots.len()),
                        format!("{num_experts} experts of as many entries as there are replicas"),
                        "give slots, -1 or -2 for each expert",
                    ));
                }
                let mut owner = vec![None; *num_slots];
                for (expert, entries) in slots.chunks(*replicas).enumerate() {
                    for entry in entries {
                        let slot = usize::try_from(*entry).ok();
                        let known = match slot {
                            // All of an expert's entries say that it is elsewhere, or missing.
                            None => (*entry == -1 || *entry == -2) && entries.iter().all(|other| other == entry),
                            Some(slot) => match owner.get_mut(slot) {
                                None => false,
                                Some(owner) => *owner.get_or_insert(expert) == expert,
                            },
                        };
                        if !known {
                            return Err(Error::invalid(
                                "placement.slots",
                                format!("{entries:?} for expert {expert}"),
                                format!("slots in 0..{num_slots} of this expert alone, or only -1, or only -2"),
                                "correct the table",
                            ));
                        }
                    }
                }
                match owner.iter().position(Option::is_none) {
                    None => Ok(()),
                    Some(slot) => Err(Error::invalid(
                        "placement.slots",
                        format!("no expert in slot {slot}"),
                        "an expert in each slot",
                        "correct the table or num_slots",
                    )),
                }
            }
        }
    }

    fn validate_entry(&self) -> Result<()> {
        match self.entry {
            Entry::TokenMajor => return Ok(()),
            Entry::Batched { capacity } => width("entry.capacity", capacity)?,
        }
        let has_zero_experts = match self.routing.zero_experts {
            None => false,
            Some(ZeroExperts { count: _, kind: _ }) => true,
        };
        let has_shared = match &self.shared {
            None => false,
            Some(SharedExperts { mlp: _, gate: _, combination: _ }) => true,
        };
        let given = match self.router {
            Router::Given { transform: LogitTransform::None } => true,
            Router::Given {
                transform: LogitTransform::SoftCap { cap: _ } | LogitTransform::Multiply { factor: _ },
            }
            | Router::Linear {
                input: RouterInput::Hidden | RouterInput::RmsNormScaled { eps: _ },
                format: _,
                bias: _,
                transform: _,
            }
            | Router::Mlp { state_size: _, rms_norm_eps: _, previous_state: _, format: _ } => false,
        };
        let separate = match self.expert_input {
            ExpertInput::Hidden => false,
            ExpertInput::Separate => true,
        };
        for (field, found) in [
            ("router", !given),
            ("routing.zero_experts", has_zero_experts),
            ("routing.apply_routed_scale_to_output", self.routing.apply_routed_scale_to_output),
            ("shared", has_shared),
            ("latent", self.latent.is_some()),
            ("expert_input", separate),
            ("output_bias", self.output_bias),
            ("output_norm", self.output_norm.is_some()),
        ] {
            if found {
                return Err(Error::invalid(
                    field,
                    "what acts outside of the experts",
                    "none beside Entry::Batched (a router that is given), as rows enter routed and leave uncombined",
                    "plan it as a layer of its own, where tokens are routed and combined",
                ));
            }
        }
        Ok(())
    }
}
