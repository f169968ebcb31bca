# SPDX-License-Identifier: Apache-2.0
"""`jai export`: a JAI without skips as a Mixtral or a Phi-3."""
