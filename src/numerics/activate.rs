//! Activations on one value. All keep NaN: comparisons are written so that NaN fails them.

use crate::spec::Activation;

/// `value`, unless it exceeds `limit`. `f32::min` would turn NaN into the limit.
fn at_most(value: f32, limit: f32) -> f32 {
    if value > limit { limit } else { value }
}

fn at_least(value: f32, limit: f32) -> f32 {
    if value < limit { limit } else { value }
}

fn clamp(value: f32, limit: Option<f32>) -> f32 {
    limit.map_or(value, |limit| at_least(at_most(value, limit), -limit))
}

fn clamp_gate(value: f32, limit: Option<f32>) -> f32 {
    limit.map_or(value, |limit| at_most(value, limit))
}

/// `g / (1 + exp(-g))`: for large negative g the exponential overflows and the quotient is -0, not NaN.
fn silu(gate: f32) -> f32 {
    gate / (1.0 + (-gate).exp())
}

/// The value that an expert's second GEMM reads: the product of [`activate_parts`]. For an activation
/// without gate, `gate` and `up` are both the value of the first GEMM.
pub fn activate(activation: Activation, gate: f32, up: f32) -> f32 {
    let [gate, up] = activate_parts(activation, gate, up);
    gate * up
}

/// The gate's factor and up's, which a rounding profile may round before their product.
pub fn activate_parts(activation: Activation, gate: f32, up: f32) -> [f32; 2] {
    match activation {
        Activation::Swiglu { limit } => [silu(clamp_gate(gate, limit)), clamp(up, limit)],
        Activation::SwigluClampAfter { limit } => [at_most(silu(gate), limit), clamp(up, Some(limit))],
        Activation::SwigluOai { alpha, limit, beta } => {
            let gate = clamp_gate(gate, limit);
            [gate / (1.0 + (-alpha * gate).exp()), clamp(up, limit) + beta]
        }
        Activation::Situ { beta, linear_beta } => {
            let sigmoid = 1.0 / (1.0 + (-gate).exp());
            [beta * (gate / beta).tanh() * sigmoid, linear_beta * (up / linear_beta).tanh()]
        }
        Activation::GeluTanh => {
            const SQRT_2_OVER_PI: f32 = 0.797_884_6;
            [0.5 * gate * (1.0 + (SQRT_2_OVER_PI * (gate + 0.044_715 * gate * gate * gate)).tanh()), up]
        }
        Activation::GeluErf => [gelu_erf(gate), up],
        Activation::Relu2 => [at_least(gate, 0.0), at_least(up, 0.0)],
    }
}

/// `g Phi(g)` with Phi from the series of erf near 0 and its continued fraction beyond, in f64.
pub fn gelu_erf(gate: f32) -> f32 {
    let x = f64::from(gate);
    let z = x.abs() / std::f64::consts::SQRT_2;
    if z.is_nan() || z > 30.0 {
        // Phi is 0 or 1 to f64; NaN stays NaN, and -inf * 0 is NaN as in the formula.
        return if gate < 0.0 { gate * 0.0 } else { gate };
    }
    let tail = if z < 2.5 {
        let (mut term, mut sum, mut n) = (z, z, 0.0);
        while term.abs() > 1e-18 * sum.abs() {
            n += 1.0;
            term *= -z * z / n;
            sum += term / (2.0 * n + 1.0);
            if n > 200.0 {
                break;
            }
        }
        1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let mut fraction = 0.0;
        for n in (1..=60).rev() {
            fraction = f64::from(n) / 2.0 / (z + fraction);
        }
        (-z * z).exp() / (z + fraction) / std::f64::consts::PI.sqrt()
    };
    let phi = if x < 0.0 { 0.5 * tail } else { 1.0 - 0.5 * tail };
    (x * phi) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clamps_bound_gate_above_and_up_on_both_sides_and_keep_nan() {
        let limited = Activation::Swiglu { limit: Some(2.0) };
        let silu2 = silu(2.0);
        assert_eq!(activate(limited, 9.0, 9.0), silu2 * 2.0);
        assert_eq!(activate(limited, 9.0, -9.0), silu2 * -2.0);
        assert_eq!(activate(limited, -9.0, 1.0), silu(-9.0));
        assert!(activate(limited, f32::NAN, 1.0).is_nan());
        assert!(activate(limited, 1.0, f32::NAN).is_nan());
        let after = Activation::SwigluClampAfter { limit: 2.0 };
        assert_eq!(activate(after, 9.0, 9.0), 4.0);
        assert!(activate(after, f32::NAN, 1.0).is_nan());
    }

    #[test]
    fn huge_negative_gates_give_zero_and_not_nan() {
        let plain = Activation::Swiglu { limit: None };
        assert_eq!(activate(plain, -1e30, 1.0), 0.0);
        assert!(activate(plain, f32::NEG_INFINITY, 1.0).is_nan());
    }

    #[test]
    fn gelu_erf_agrees_with_known_values() {
        // Abramowitz and Stegun, table 26.1: Phi(1), Phi(2), Phi(-3), Phi(4).
        for (x, phi) in [
            (1.0f32, 0.841_344_746_068_543),
            (2.0, 0.977_249_868_051_821),
            (-3.0, 0.001_349_898_031_630),
            (4.0, 0.999_968_328_758_167),
        ] {
            let want = f64::from(x) * phi;
            let got = f64::from(activate(Activation::GeluErf, x, 1.0));
            assert!((got - want).abs() <= 1e-7 * want.abs(), "{x}: {got} {want}");
        }
    }
}
