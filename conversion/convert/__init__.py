# SPDX-License-Identifier: Apache-2.0
"""`jai convert`: a phi-3 becomes a JAI."""
