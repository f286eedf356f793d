// f32 division and multiplication of magnitudes on integers, rounded to nearest even: WGSL's own division may
// be 2.5 ulp off. Results below the normal numbers become 0. Twin: the same operations of numerics on a CPU.
const INFINITE: u32 = 0x7f800000u;
const NAN_BITS: u32 = 0x7fc00000u;

// A finite magnitude above 0 as mantissa (24 bits, the highest set) and biased exponent.
struct Unpacked {
    mantissa: u32,
    exponent: i32,
}

fn unpack(bits: u32) -> Unpacked {
    let exponent = i32(bits >> 23u);
    let fraction = bits & 0x7fffffu;
    if exponent > 0 {
        return Unpacked(fraction | 0x800000u, exponent);
    }
    let shift = countLeadingZeros(fraction) - 8u;
    return Unpacked(fraction << shift, 1 - i32(shift));
}

// A rounded mantissa, which may have reached 2^24.
fn pack_float(mantissa: u32, exponent: i32) -> u32 {
    if exponent <= 0 {
        return 0u;
    }
    return min((u32(min(exponent, 255)) << 23u) + mantissa - 0x800000u, INFINITE);
}

fn divide(dividend: u32, divisor: u32) -> u32 {
    if max(dividend, divisor) > INFINITE || (dividend == INFINITE && divisor == INFINITE) {
        return NAN_BITS;
    }
    if dividend == 0u || divisor == INFINITE {
        return select(0u, NAN_BITS, divisor == 0u);
    }
    if dividend == INFINITE || divisor == 0u {
        return INFINITE;
    }
    var above = unpack(dividend);
    let below = unpack(divisor);
    var exponent = above.exponent - below.exponent + 127;
    if above.mantissa < below.mantissa {
        above.mantissa <<= 1u;
        exponent -= 1;
    }
    // An estimate, at most 4 units off (2.5 of the division, 1 of the cut), and its exact remainder: it fits the low
    // word of the product.
    var quotient = u32(f32(above.mantissa) / f32(below.mantissa) * 8388608.0);
    var rest = bitcast<i32>((above.mantissa << 23u) - quotient * below.mantissa);
    for (var step = 0u; step < 5u; step++) {
        if rest < 0 {
            quotient -= 1u;
            rest += i32(below.mantissa);
        } else if rest >= i32(below.mantissa) {
            quotient += 1u;
            rest -= i32(below.mantissa);
        }
    }
    let twice = 2u * u32(rest);
    if twice > below.mantissa || (twice == below.mantissa && (quotient & 1u) == 1u) {
        quotient += 1u;
    }
    return pack_float(quotient, exponent);
}

fn multiply(first: u32, second: u32) -> u32 {
    if max(first, second) > INFINITE {
        return NAN_BITS;
    }
    if min(first, second) == 0u {
        return select(0u, NAN_BITS, max(first, second) == INFINITE);
    }
    if max(first, second) == INFINITE {
        return INFINITE;
    }
    let a = unpack(first);
    let b = unpack(second);
    let a_high = a.mantissa >> 12u;
    let a_low = a.mantissa & 0xfffu;
    let b_high = b.mantissa >> 12u;
    let b_low = b.mantissa & 0xfffu;
    // 48 bits in two words of 24.
    let middle = a_high * b_low + a_low * b_high;
    let bottom = a_low * b_low + ((middle & 0xfffu) << 12u);
    let high = a_high * b_high + (middle >> 12u) + (bottom >> 24u);
    let low = bottom & 0xffffffu;
    var exponent = a.exponent + b.exponent - 127;
    var mantissa = high;
    var rest = low;
    var half = 0x800000u;
    if high >= 0x800000u {
        exponent += 1;
    } else {
        mantissa = (high << 1u) | (low >> 23u);
        rest = low & 0x7fffffu;
        half = 0x400000u;
    }
    if rest > half || (rest == half && (mantissa & 1u) == 1u) {
        mantissa += 1u;
    }
    return pack_float(mantissa, exponent);
}
