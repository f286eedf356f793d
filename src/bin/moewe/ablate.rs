//! `moewe run --ablate`: what dropping a field would have done to the output, as an engine does that takes the field
//! from the config and never hands it to a kernel. The reference computes both layers.

use moewe::conformance::ablation::{Ablation, ablations};
use moewe::{Error, MoeSpec, MoeWeights, Result};

use crate::check;
use crate::inputs::RandomTokens;
use crate::metrics;
use crate::progress::Bar;
use crate::reference_engine::{layer, route};

/// Words of `--ablate` that are no fields.
const LIST: &str = "list";
const ALL: &str = "all";

/// What `--ablate` asks for.
pub enum Wanted {
    /// The fields that can be dropped.
    List(Vec<Ablation>),
    /// What dropping each of these does.
    Drop(Vec<Ablation>),
}

/// What `words` mean for a layer.
///
/// # Errors
/// A word that names nothing that can be dropped from it.
pub fn wanted(spec: &MoeSpec, words: &[String]) -> Result<Wanted> {
    let all = ablations(spec);
    if words.iter().any(|word| word == LIST) {
        return Ok(Wanted::List(all));
    }
    for word in words.iter().filter(|word| *word != ALL) {
        if !all.iter().any(|ablation| ablation.is_called(word)) {
            let known: Vec<&str> = all.iter().map(|ablation| ablation.key).collect();
            let expected =
                if known.is_empty() { "nothing: none of its fields can be dropped".into() } else { known.join(", ") };
            let remedy = "a field at its neutral value has no effect; --ablate list says what this layer has";
            return Err(Error::invalid("--ablate", word, expected, remedy));
        }
    }
    let named = |ablation: &Ablation| words.iter().any(|word| word == ALL || ablation.is_called(word));
    Ok(Wanted::Drop(all.into_iter().filter(named).collect()))
}

/// What became of a layer without a field.
pub struct Effect {
    /// Path of the field.
    pub field: String,
    /// What configs call it.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What the layer is without it.
    pub instead: &'static str,
    /// Tokens whose routing was computed.
    pub tokens: usize,
    /// How many of them choose other experts.
    pub tokens_with_other_experts: usize,
    /// `|without - with| / |with|` of the output's rows together.
    pub relative_error: f64,
    /// Likewise of each row.
    pub row_errors: Vec<f64>,
}

/// Drops each field alone. Routes `count` tokens, and computes the output of as many as the reference does in seconds.
///
/// # Errors
/// Those of the reference.
pub fn effects(
    spec: &MoeSpec,
    weights: &MoeWeights<'_>,
    tokens: &RandomTokens,
    count: usize,
    fields: &[Ablation],
) -> Result<Vec<Effect>> {
    let checkable = check::checkable(spec, count);
    let (all, few) = (tokens.first(count, spec), tokens.first(checkable, spec));
    let ids = |spec: &MoeSpec, weights: &MoeWeights<'_>| -> Result<Vec<i32>> {
        let routed = route(spec, &weights.router, &all)?;
        Ok(metrics::sort_slots(&routed.topk_ids, &routed.topk_weights, spec.top_k).0)
    };
    let (right_ids, right) = (ids(spec, weights)?, layer(spec, weights, &few)?.output);
    let effect = |ablation: &Ablation| {
        let Ablation { field, key, value, instead, spec: without } = ablation;
        let left = ablation.weights(weights);
        let (other_ids, wrong) = (ids(without, &left)?, layer(without, &left, &few)?.output);
        let rows = right_ids.chunks(spec.top_k).zip(other_ids.chunks(spec.top_k));
        let width = spec.hidden_size;
        let row_errors = wrong.chunks(width).zip(right.chunks(width));
        Ok(Effect {
            field: field.clone(),
            key,
            value: value.clone(),
            instead,
            tokens: count,
            tokens_with_other_experts: rows.filter(|(right, other)| right != other).count(),
            relative_error: metrics::row_relative(&wrong, &right, wrong.len()),
            row_errors: row_errors.map(|(wrong, right)| metrics::row_relative(wrong, right, width)).collect(),
        })
    };
    let bar = Bar::new();
    let with_bar = |(done, field): (usize, &Ablation)| {
        bar.at("dropping fields", done as u64, fields.len() as u64);
        effect(field)
    };
    fields.iter().enumerate().map(with_bar).collect()
}

/// A share of one, readable whether it is large or tiny.
pub fn percent(share: f64) -> String {
    let hundred = 100.0 * share;
    if hundred == 0.0 {
        "0 %".into()
    } else if hundred >= 0.095 {
        format!("{hundred:.1} %")
    } else {
        format!("{hundred:.0e} %")
    }
}

impl Effect {
    /// Smallest, median and largest error of a row.
    pub fn spread(&self) -> [f64; 3] {
        let mut sorted = self.row_errors.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(0.0);
        [at(0), at(sorted.len() / 2), at(sorted.len().saturating_sub(1))]
    }

    /// What it means, in a sentence.
    pub fn sentence(&self) -> String {
        let Self {
            field: _,
            key,
            value,
            instead,
            tokens,
            tokens_with_other_experts: other,
            relative_error,
            row_errors,
        } = self;
        let dropped = format!("An engine that drops {key} = {value} computes as if {instead}");
        let experts = match *other {
            0 => "every token keeps its experts".to_owned(),
            other if other == *tokens => "every token goes to other experts".to_owned(),
            other => format!("{other} of {tokens} tokens go to other experts"),
        };
        if relative_error.is_nan() {
            return format!("{dropped}: NaN where a number is right, and {experts}.");
        }
        if *relative_error == 0.0 && *other == 0 {
            let rows = row_errors.len();
            return format!("{dropped}: no difference in {rows} random tokens, which such a field may never meet.");
        }
        format!("{dropped}: the output is off by {}, and {experts}. Nothing fails.", percent(*relative_error))
    }
}

#[cfg(test)]
mod tests {
    use super::percent;

    #[test]
    fn shares_are_readable_at_any_size() {
        let texts = [0.0, 1e-7, 0.0004, 0.00123, 0.5, 12.0].map(percent);
        assert_eq!(texts, ["0 %", "1e-5 %", "4e-2 %", "0.1 %", "50.0 %", "1200.0 %"]);
    }
}
