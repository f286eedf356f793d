// Nearest E4M3FN code of a magnitude, ties to even, saturated, NaN kept. Twin: numerics::encode_e4m3.
fn nearest_e4m3(magnitude: u32) -> u32 {
    var code = 0x7fu;
    if magnitude <= 0x7f800000u {
        if magnitude >= 0x43e00000u {
            code = 0x7eu;
        } else if magnitude >= 0x3c800000u {
            code = ((magnitude + 0x7ffffu + ((magnitude >> 20u) & 1u)) >> 20u) - 960u;
        } else {
            // Subnormal: an integer times 2^-9; below 2^-11 it is 0.
            let exponent = magnitude >> 23u;
            code = 0u;
            if exponent >= 116u {
                let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
                let shift = 141u - exponent;
                code = (mantissa + (1u << (shift - 1u)) - 1u + ((mantissa >> shift) & 1u)) >> shift;
            }
        }
    }
    return code;
}

fn encode_code(sign: u32, magnitude: u32) -> u32 {
    return nearest_e4m3(magnitude) | (sign << 7u);
}
