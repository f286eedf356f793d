//! From values to codes and a scale, as a quantising kernel has to compute them: bit for bit.

use std::borrow::Borrow;

use super::{ceil_e8m0, decode_e4m3, decode_e8m0, encode_e4m3};
use crate::spec::{ActivationCode, ActivationScale, ScaleRule};

/// Value of an activation's code, without its scale.
pub fn decode_activation(code: ActivationCode, byte: u8) -> f32 {
    match code {
        ActivationCode::E4m3 => decode_e4m3(byte),
        ActivationCode::Int8 => f32::from(byte as i8),
    }
}

/// The code of a value that is divided by its scale already.
pub fn encode_activation(code: ActivationCode, value: f32) -> u8 {
    match code {
        ActivationCode::E4m3 => encode_e4m3(value),
        // `as` saturates and makes NaN 0.
        ActivationCode::Int8 => value.round_ties_even() as i8 as u8,
    }
}

/// The largest magnitude: NaN if any value is, else infinite if any value is.
pub fn largest_magnitude(values: impl IntoIterator<Item = impl Borrow<f32>>) -> f32 {
    // As integers, magnitudes order like the numbers and NaN stands above all.
    let bits = values.into_iter().map(|value| value.borrow().to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    f32::from_bits(if bits > 0x7f80_0000 { 0x7fc0_0000 } else { bits })
}

/// What the values of a span share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SpanScale {
    /// The scale: value = code * scale.
    pub scale: f32,
    /// What a value is multiplied with, where it is not divided by the scale.
    pub factor: Option<f32>,
}

impl SpanScale {
    /// Of a span with this largest magnitude.
    pub fn dynamic(code: ActivationCode, rule: ScaleRule, scale: ActivationScale, amax: f32) -> Self {
        let max = code.max();
        // Where NaN is, it stays.
        let at_least = |value: f32, floor: f32| if value < floor { floor } else { value };
        let raw = match rule {
            ScaleRule::FlooredAmax => at_least(amax, 1e-10) / max,
            ScaleRule::FlooredAmaxTimesReciprocal => at_least(amax, 1e-10) * (1.0 / max),
            ScaleRule::FlooredScale { upper } => {
                let ratio = amax / max;
                let bounded = upper.map_or(ratio, |upper| if ratio > upper { upper } else { ratio });
                at_least(bounded, scale_floor(code))
            }
            ScaleRule::ReciprocalScale | ScaleRule::ReciprocalAmax => at_least(amax, 1e-4) / max,
        };
        let scale = match scale {
            ActivationScale::F32 => raw,
            ActivationScale::F32CeilPow2 | ActivationScale::Ue8m0Packed => decode_e8m0(ceil_e8m0(raw)),
        };
        let scale = if scale.is_nan() { f32::from_bits(0x7fc0_0000) } else { scale };
        let factor = match rule {
            ScaleRule::FlooredAmax | ScaleRule::FlooredAmaxTimesReciprocal | ScaleRule::FlooredScale { upper: _ } => {
                None
            }
            ScaleRule::ReciprocalScale => Some(1.0 / scale),
            ScaleRule::ReciprocalAmax => Some(max / at_least(amax, 1e-4)),
        };
        Self { scale, factor }
    }

    /// Of a scale that the checkpoint has.
    pub fn fixed(scale: f32) -> Self {
        Self { scale, factor: None }
    }

    /// The code of one value. A NaN, of the value or the scale, keeps the value's sign.
    pub fn encode(self, code: ActivationCode, value: f32) -> u8 {
        let quotient = self.factor.map_or_else(|| value / self.scale, |factor| value * factor);
        let quotient = if quotient.is_nan() { f32::NAN.copysign(value) } else { quotient };
        encode_activation(code, quotient)
    }
}

/// Smallest scale of [`ScaleRule::FlooredScale`].
pub fn scale_floor(code: ActivationCode) -> f32 {
    match code {
        ActivationCode::E4m3 => 1.0 / (448.0 * 512.0),
        ActivationCode::Int8 => f32::EPSILON,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: [ScaleRule; 5] = [
        ScaleRule::FlooredAmax,
        ScaleRule::FlooredAmaxTimesReciprocal,
        ScaleRule::FlooredScale { upper: None },
        ScaleRule::ReciprocalScale,
        ScaleRule::ReciprocalAmax,
    ];

    #[test]
    fn zeros_have_the_floor_as_scale_and_zeros_as_codes() {
        for code in [ActivationCode::E4m3, ActivationCode::Int8] {
            for rule in RULES {
                let span = SpanScale::dynamic(code, rule, ActivationScale::F32, 0.0);
                assert!(span.scale > 0.0, "{rule:?}");
                assert_eq!(span.encode(code, 0.0), 0);
            }
        }
    }

    #[test]
    fn nan_and_infinity_reach_the_scale() {
        assert!(largest_magnitude([1.0, f32::NAN, f32::INFINITY]).is_nan());
        assert_eq!(largest_magnitude([1.0, f32::NEG_INFINITY]), f32::INFINITY);
        let code = ActivationCode::E4m3;
        for rule in RULES {
            for scale in [ActivationScale::F32, ActivationScale::F32CeilPow2] {
                let span = SpanScale::dynamic(code, rule, scale, f32::NAN);
                assert_eq!(span.scale.to_bits(), 0x7fc0_0000, "{rule:?}");
                assert_eq!([1.0, -1.0].map(|value| span.encode(code, value)), [0x7f, 0xff]);
            }
            let span = SpanScale::dynamic(code, rule, ActivationScale::F32, f32::INFINITY);
            assert_eq!(span.scale, f32::INFINITY);
            assert_eq!([1.0, -1.0, f32::INFINITY].map(|value| span.encode(code, value)), [0, 0x80, 0x7f]);
        }
    }

    #[test]
    fn int8_rounds_half_to_even_and_saturates() {
        let one = SpanScale::fixed(1.0);
        let code = |value: f32| one.encode(ActivationCode::Int8, value) as i8;
        let cases = [(0.5, 0), (1.5, 2), (-2.5, -2), (127.4, 127), (127.5, 127), (-129.0, -128), (1e9, 127)];
        for (value, want) in cases {
            assert_eq!(code(value), want, "{value}");
        }
        assert_eq!(code(f32::NAN), 0);
    }
}
