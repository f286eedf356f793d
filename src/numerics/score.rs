//! Router scores of one logit and the order in which keys are compared.

use crate::spec::Denominator;

/// `1 / (1 + exp(-l))`; 0 and 1 at the infinities.
pub fn sigmoid(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}

/// `log(1 + exp l)`, with `l` itself above 20 where both agree in f32.
pub fn softplus(logit: f32) -> f32 {
    if logit > 20.0 { logit } else { logit.exp().ln_1p() }
}

/// `sqrt(softplus l)` (DeepSeek-V4).
pub fn sqrt_softplus(logit: f32) -> f32 {
    softplus(logit).sqrt()
}

/// `log(sigmoid l)` without loss at either end.
pub fn log_sigmoid(logit: f32) -> f32 {
    (if logit < 0.0 { logit } else { 0.0 }) - (-logit.abs()).exp().ln_1p()
}

/// D of `w /= D(sum w)`; `weights` are only read by the p-norm. 0 means "all weights become 0".
pub fn denominator(rule: Denominator, weights: &[f32]) -> f32 {
    let sum = || weights.iter().sum::<f32>();
    match rule {
        Denominator::Sum => sum(),
        Denominator::SumPlus { eps } => sum() + eps,
        Denominator::AtLeast { floor } => {
            let sum = sum();
            if sum < floor { floor } else { sum }
        }
        Denominator::SumOrOne => {
            let sum = sum();
            if sum > 0.0 { sum } else { 1.0 }
        }
        Denominator::PNorm { p } => weights.iter().map(|w| w.abs().powf(p)).sum::<f32>().powf(1.0 / p),
    }
}

/// A u32 that orders like `key`: -0 equals +0, infinities are ordered. Never 0 for a number, so that
/// 0 can stand for "may not be selected before any number". NaN must be tested before.
pub fn order_key(key: f32) -> u32 {
    let bits = if key == 0.0 { 0 } else { key.to_bits() };
    if bits & 0x8000_0000 == 0 { bits | 0x8000_0000 } else { !bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_key_orders_like_the_numbers() {
        let rising = [f32::NEG_INFINITY, f32::MIN, -1.0, -1e-40, 0.0, 1e-40, 1.0, f32::MAX, f32::INFINITY];
        assert!(rising.windows(2).all(|pair| order_key(pair[0]) < order_key(pair[1])));
        assert_eq!(order_key(-0.0), order_key(0.0));
        assert!(order_key(f32::NEG_INFINITY) > 0);
    }
}
