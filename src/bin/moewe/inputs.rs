//! Random tokens that every machine draws alike.

use std::f64::consts::TAU;

use moewe::numerics::round_to;
use moewe::reference::Inputs;
use moewe::spec::{ExpertInput, FloatType, Router, RoutingMethod};
use moewe::{Error, MoeSpec, Result};
use rayon::prelude::*;

/// Tokens of one run.
pub struct RandomTokens {
    /// [T, H].
    pub hidden_states: Vec<f32>,
    /// `[T]`, if the layer routes by token id.
    pub token_ids: Option<Vec<u32>>,
    /// [T, H], if the experts read another input.
    pub expert_hidden_states: Option<Vec<f32>>,
    /// [T, outputs], if the caller gives the logits.
    pub logits: Option<Vec<f32>>,
    /// [T, S], if a state enters the router.
    pub router_states: Option<Vec<f32>>,
}

/// Numbers of one seed: `mix(mix(seed) + index)`, where mix is one step of splitmix64 (Steele, Lea and
/// Flood, 2014). A number depends on its index alone, so that more tokens begin with the same ones.
#[derive(Debug, Clone, Copy)]
struct Random {
    key: u64,
}

fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

impl Random {
    fn new(seed: u64) -> Self {
        Self { key: mix(seed) }
    }

    fn bits(self, index: u64) -> u64 {
        mix(self.key.wrapping_add(index))
    }

    /// In (0, 1): 53 bits, and never 0.
    fn uniform(self, index: u64) -> f64 {
        ((self.bits(index) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Of the standard normal distribution, by Box and Muller.
    fn normal(self, index: u64) -> f64 {
        let radius = (-2.0 * self.uniform(2 * index).ln()).sqrt();
        radius * (TAU * self.uniform(2 * index + 1)).cos()
    }
}

impl RandomTokens {
    /// Draws `tokens` rows of bf16 values, and token ids below the vocabulary's size if the spec wants some.
    ///
    /// # Errors
    /// More than memory holds.
    pub fn draw(spec: &MoeSpec, tokens: usize, seed: u64) -> Result<Self> {
        let too_many = || {
            let expected = "as many as memory holds";
            Error::invalid("tokens", tokens, expected, "ask for fewer")
        };
        let rows = |stream: u64, width: usize, to: FloatType| -> Result<Vec<f32>> {
            let values = tokens.checked_mul(width).ok_or_else(too_many)?;
            let mut rows: Vec<f32> = Vec::new();
            rows.try_reserve_exact(values).map_err(|_| too_many())?;
            let random = Random::new(seed.wrapping_add(stream));
            // bf16 values whatever the type is, so that runs of one seed compare; F16 then rounds the tiny ones.
            let value = |index: usize| round_to(to, round_to(FloatType::Bf16, random.normal(index as u64) as f32));
            rows.par_extend((0..values).into_par_iter().map(value));
            Ok(rows)
        };
        let input = spec.precision.input;
        let hidden_states = rows(0, spec.hidden_size, input)?;
        let separate = match spec.expert_input {
            ExpertInput::Hidden => false,
            ExpertInput::Separate => true,
        };
        // Streams far from each other and from any seed of a user's.
        let expert_hidden_states = separate.then(|| rows(0x5eed_0001 << 32, spec.hidden_size, input)).transpose()?;
        let (given, states) = match spec.router {
            Router::Given { transform: _ } => (true, false),
            Router::Mlp { state_size: _, rms_norm_eps: _, previous_state, format: _ } => (false, previous_state),
            Router::Linear { input: _, format: _, bias: _, transform: _ } => (false, false),
        };
        let logits = given.then(|| rows(0x5eed_0002 << 32, spec.router_outputs(), FloatType::F32)).transpose()?;
        let router_states =
            states.then(|| rows(0x5eed_0003 << 32, state_size(&spec.router), FloatType::F32)).transpose()?;
        let ids = Random::new(!seed);
        let vocabulary = vocab_size(&spec.routing.method);
        let id = |size: usize, token: usize| (ids.bits(token as u64) % size.max(1) as u64) as u32;
        let token_ids = vocabulary.map(|size| (0..tokens).map(|token| id(size, token)).collect());
        Ok(Self { hidden_states, token_ids, expert_hidden_states, logits, router_states })
    }

    /// The first `tokens` of them.
    pub fn first(&self, tokens: usize, spec: &MoeSpec) -> Inputs<'_> {
        fn rows<T>(values: &[T], width: usize, tokens: usize) -> &[T] {
            &values[..(tokens * width).min(values.len())]
        }
        let Self { hidden_states, token_ids, expert_hidden_states, logits, router_states } = self;
        Inputs {
            hidden_states: rows(hidden_states, spec.hidden_size, tokens),
            token_ids: token_ids.as_ref().map(|ids| rows(ids, 1, tokens)),
            logits: logits.as_ref().map(|logits| rows(logits, spec.router_outputs(), tokens)),
            expert_hidden_states: expert_hidden_states.as_ref().map(|x| rows(x, spec.hidden_size, tokens)),
            router_states: router_states.as_ref().map(|states| rows(states, state_size(&spec.router), tokens)),
            // Layers of a checkpoint are whole and bring no adapters.
            adapter_ids: None,
            counts: None,
            row_weights: None,
        }
    }
}

/// Width of the router's state; 0 without one.
pub fn state_size(router: &Router) -> usize {
    match *router {
        Router::Mlp { state_size, rms_norm_eps: _, previous_state: _, format: _ } => state_size,
        Router::Linear { input: _, format: _, bias: _, transform: _ } | Router::Given { transform: _ } => 0,
    }
}

/// Token ids that the routing knows, if it asks for any.
fn vocab_size(method: &RoutingMethod) -> Option<usize> {
    match method {
        RoutingMethod::Hash { score: _, vocab_size } => Some(*vocab_size),
        RoutingMethod::TopK { score: _, key: _, groups: _ }
        | RoutingMethod::TopKThenScore { score: _ }
        | RoutingMethod::JointNorm { num_shared: _, global_scale: _ }
        | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Random, mix};

    #[test]
    fn mix_is_splitmix64() {
        // First outputs of the published generator with state 0 and 1234567.
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix(1_234_567), 6_457_827_717_110_365_317);
    }

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let random = Random::new(7);
        let values: Vec<f64> = (0..100_000).map(|index| random.normal(index)).collect();
        let mean = values.iter().sum::<f64>() / 1e5;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 1e5;
        // Five standard errors: 5 / sqrt(n) and 5 sqrt(2 / n).
        assert!(mean.abs() < 0.016 && (variance - 1.0).abs() < 0.023, "{mean} {variance}");
    }
}
